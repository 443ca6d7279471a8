import math
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmpre.attention import Causal, Full, Together, Window
from mmpre.attention.backends import attend, attention_probabilities
from mmpre.attention.bias import ALiBi
from mmpre.attention.explicit import Explicit
from mmpre.dropout import Dropout
from mmpre.layout import Layout

RAGGED = [0, 3, 3, 3, 4, 0, 9, 1]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}
attends = pytest.mark.parametrize("who", [Full(), Causal()], ids=["full", "causal"])


@pytest.fixture
def force(monkeypatch):
    return lambda name: monkeypatch.setenv("MMPRE_ATTENTION", name)


def layout_of(lengths):
    return Layout({"text": torch.tensor(lengths, dtype=torch.int64)})


def some_qkv(lengths, *, heads=2, width=8, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(sum(lengths), 3, heads, width, dtype=torch.float64, generator=rng).to(dtype).requires_grad_()


def forward_and_gradient(qkv_N3HK, plan):
    y_NHK = attend(*qkv_N3HK.unbind(1), plan)
    weight = torch.linspace(-1, 1, y_NHK.numel(), dtype=y_NHK.dtype).view_as(y_NHK)
    return y_NHK, torch.autograd.grad((y_NHK * weight).sum(), qkv_N3HK)[0]


def by_hand(q_nHK, k_nHK, v_nHK, attend_nn):
    score_Hnn = q_nHK.transpose(0, 1) @ k_nHK.permute(1, 2, 0) / math.sqrt(q_nHK.shape[2])
    return (score_Hnn.masked_fill(~attend_nn, -math.inf).softmax(-1) @ v_nHK.transpose(0, 1)).transpose(0, 1)


@attends
@pytest.mark.parametrize("lengths", [RAGGED, [5], [4] * 6, [], [0, 0], list(range(1, 12))], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_groups_equal_the_float64_reference_forward_and_gradient(who, lengths, dtype, force):
    plan = who.plan(layout_of(lengths))
    qkv = some_qkv(lengths, dtype=dtype)
    force("dense")
    want = forward_and_gradient(qkv.detach().double().requires_grad_(), plan)
    force("groups")
    for got, wanted in zip(forward_and_gradient(qkv, plan), want, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@attends
def test_the_reference_equals_attention_written_out_for_one_row(who, force):
    force("dense")
    qkv = some_qkv(RAGGED)
    layout = layout_of(RAGGED)
    y_NHK = attend(*qkv.unbind(1), who.plan(layout))
    start, end = sum(RAGGED[:6]), sum(RAGGED[:7])
    allowed = torch.tensor([[isinstance(who, Full) or k <= q for k in range(9)] for q in range(9)])
    assert torch.equal(who.plan(layout).dense(6), allowed)
    torch.testing.assert_close(y_NHK[start:end], by_hand(*qkv[start:end].unbind(1), allowed))


@attends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_rows_take_the_same_values(who, dtype, force):
    lengths = [7, 1200]
    qkv = some_qkv(lengths, heads=1, dtype=dtype)
    plan = who.plan(layout_of(lengths))
    y, grad = forward_and_gradient(qkv, plan)
    force("dense")
    y_dense, grad_dense = forward_and_gradient(qkv.detach().double().requires_grad_(), plan)
    torch.testing.assert_close(y.double(), y_dense, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(grad.double(), grad_dense, atol=2 * TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["groups", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_changed_row_changes_no_other_row_not_even_through_nan(backend, dtype, force):
    force(backend)
    plan = Full().plan(layout_of(RAGGED))
    qkv = some_qkv(RAGGED, dtype=dtype).detach()
    changed = qkv.clone()
    changed[3:6] = math.nan  # the second row of length 3
    before, after = (attend(*x.unbind(1), plan) for x in (qkv, changed))
    assert after[3:6].isnan().all()
    assert torch.equal(torch.cat([before[:3], before[6:]]), torch.cat([after[:3], after[6:]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_causal_tokens_do_not_see_what_follows_and_full_ones_do(dtype):
    qkv = some_qkv([6, 6], dtype=dtype).detach()
    changed = qkv.clone()
    changed[10] += 1  # the fifth token of the second row
    for who, same in ((Causal(), [*range(10)]), (Full(), [*range(6)])):
        plan = who.plan(layout_of([6, 6]))
        before, after = (attend(*x.unbind(1), plan) for x in (qkv, changed))
        moved = (before != after).flatten(1).any(1)
        assert not moved[same].any()
        assert moved[len(same) :].all()


def test_probabilities_are_those_that_attention_uses(force):
    lengths = [2, 5, 0, 5]
    qkv = some_qkv(lengths)
    q, k, v = qkv.unbind(1)
    plan = Causal().plan(layout_of(lengths))
    weights = attention_probabilities(q, k, plan)
    assert [tuple(w.shape) for w in weights] == [(2, n, n) for n in lengths]
    assert (weights[1].triu(1) == 0).all()
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(2, 5, dtype=torch.float64))
    y_NHK = attend(q, k, v, plan)
    torch.testing.assert_close(torch.einsum("hqk,khd->qhd", weights[3], v[7:]), y_NHK[7:])


@attends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_drops_its_share_of_weights_and_keeps_the_mean(who, dtype):
    lengths = [40] * 8
    q, k, _ = some_qkv(lengths, dtype=dtype).detach().unbind(1)
    v = torch.ones_like(q)
    plan = who.plan(layout_of(lengths))
    torch.manual_seed(0)
    first = attend(q * 0, k, v, plan, dropout=0.25)
    torch.manual_seed(0)
    assert torch.equal(first, attend(q * 0, k, v, plan, dropout=0.25))
    assert not torch.equal(first, attend(q * 0, k, v, plan, dropout=0.25))
    assert first.float().mean() == pytest.approx(1, abs=0.04)
    assert first.float().var() > 0
    # The last token of a row sees all 40 in both kinds: the variance of a mean of 40 kept-or-dropped values.
    assert first.view(8, 40, 2, 8)[:, -1].float()[..., 0].var() == pytest.approx(0.25 / 0.75 / 40, rel=1.5)


def test_dropout_costs_no_gradient_on_what_was_dropped():
    torch.manual_seed(0)
    x = torch.randn(50, 41, requires_grad=True)
    drop = Dropout(0.1)
    for y in (drop(x), drop.add(torch.zeros_like(x), x)):
        kept = y != 0
        assert kept.float().mean() == pytest.approx(0.9, abs=0.02)
        torch.testing.assert_close(y[kept], x[kept] / 0.9, rtol=1e-4, atol=0)
        (grad,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(grad, kept / 0.9, rtol=1e-4, atol=0)
    drop.eval()
    assert drop(x) is x
    with pytest.raises(ValueError, match=r"Dropout: p must be .* got 1\.5"):
        Dropout(1.5)


def test_an_unknown_backend_is_refused_with_the_known_ones(force):
    force("flash")
    qkv = some_qkv([3])
    with pytest.raises(ValueError, match=r"MMPRE_ATTENTION.*groups, xformers, varlen, flex, dense.*'flash'"):
        attend(*qkv.unbind(1), Full().plan(layout_of([3])))


@attends
def test_a_plan_can_be_pickled_and_moved(who):
    plan = pickle.loads(pickle.dumps(who.plan(layout_of(RAGGED))))
    assert plan.groups == [(3, 3, 3), (1, 4, 4), (1, 9, 9), (1, 1, 1)]
    for start, longest in plan.starts:
        assert (start.tolist(), longest) == ([0, 3, 6, 9, 13, 22, 23], 9)
    assert plan.to("cpu") is plan
    moved = plan.to("meta")
    assert moved.starts[0][0].device.type == "meta"
    assert moved.groups == plan.groups


# CUDA backends: what they are asked for, without a GPU.


@attends
def test_varlen_is_asked_for_what_its_documentation_says(who, force, monkeypatch):
    asked = {}

    def varlen_attn(q, k, v, starts_q, starts_k, longest_q, longest_k, is_causal=False):
        asked.update(longest=(longest_q, longest_k), types={starts_q.dtype, starts_k.dtype})
        parts = []
        for start, end in zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True):
            allowed = torch.ones(end - start, end - start, dtype=torch.bool)
            parts.append(by_hand(q[start:end], k[start:end], v[start:end], allowed.tril() if is_causal else allowed))
        return torch.cat(parts)

    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    plan = who.plan(layout_of(RAGGED))
    q, k, v = some_qkv(RAGGED, dtype=torch.bfloat16).unbind(1)
    force("varlen")
    got = attend(q, k, v, plan)
    assert asked == {"longest": (9, 9), "types": {torch.int32}}
    force("dense")
    torch.testing.assert_close(got, attend(q, k, v, plan), atol=3e-2, rtol=3e-2)
    force("varlen")
    with pytest.raises(ValueError, match=r"no dropout.*got dropout 0\.1"):
        attend(q, k, v, plan, dropout=0.1)
    with pytest.raises(ValueError, match=r"bfloat16.*got dropout 0\.0 and torch\.float32"):
        attend(q.float(), k.float(), v.float(), plan)


@attends
def test_varlen_takes_cuda_tensors(who, force):
    pytest.importorskip("torch.nn.attention.varlen")
    force("varlen")
    plan = who.plan(layout_of(RAGGED))
    with FakeTensorMode():
        qkv = torch.empty(sum(RAGGED), 3, 2, 32, dtype=torch.bfloat16, device="cuda")
        y_NHK = attend(*qkv.unbind(1), plan.to("cuda"))
        assert (y_NHK.shape, y_NHK.dtype, y_NHK.device.type) == ((23, 2, 32), torch.bfloat16, "cuda")
        y_NHK.flatten(1)  # the out projection reads it this way


@pytest.mark.parametrize("who", [Full(), Causal(), Together(Causal(), Window(2))], ids=str)
def test_the_xformers_bias_allows_what_the_plan_allows(who):
    pytest.importorskip("xformers.ops")
    layout = layout_of(RAGGED)
    allowed_NN = torch.block_diag(*(who.plan(layout).dense(row).float() for row in range(len(layout)) if RAGGED[row]))
    bias_NN = who.plan(layout).xformers_bias.materialize((23, 23))
    assert set(bias_NN.unique().tolist()) <= {0.0, -math.inf}
    assert torch.equal(bias_NN == 0, allowed_NN == 1)


@pytest.mark.parametrize("who", [Full(), Causal(), Together(Causal(), Window(2))], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_xformers_takes_cuda_tensors(who, dropout, dtype, force, monkeypatch):
    pytest.importorskip("xformers.ops")
    from xformers.ops.fmha import attn_bias

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(  # the original pins memory, which wants a driver
        attn_bias, "_to_device_tensor", lambda seq, dtype, device: torch.tensor(seq, dtype=dtype, device=device)
    )
    force("xformers")
    plan = who.plan(layout_of(RAGGED))
    with FakeTensorMode():
        moved = plan.to("cuda")
        qkv = torch.empty(sum(RAGGED), 3, 2, 32, dtype=dtype, device="cuda")
        y_NHK = attend(*qkv.unbind(1), moved, dropout=dropout)
        assert (y_NHK.shape, y_NHK.dtype, y_NHK.device.type) == ((23, 2, 32), dtype, "cuda")
        y_NHK.flatten(1)
        assert moved.xformers_bias is moved.xformers_bias
        assert moved.xformers_bias.q_seqinfo.seqstart.device.type == "cuda"


def test_the_backend_is_chosen_by_device_type_plan_bias_and_dropout(monkeypatch):
    from mmpre.attention import backends as backends

    with FakeTensorMode():
        half, full = (torch.empty(3, 1, 8, dtype=t, device="cuda") for t in (torch.bfloat16, torch.float32))
        plan = Full().plan(layout_of([3]))
        assert backends._best(torch.empty(3, 1, 8), plan, ALiBi(1), 0.0) == "groups"
        monkeypatch.setattr(backends, "_has_xformers", lambda: True)
        assert {backends._best(x, plan, None, p) for x in (half, full) for p in (0.0, 0.1)} == {"xformers"}
        for has_xformers, wanted in (
            (True, ["xformers", "xformers", "xformers", "flex", "flex", "groups", "flex", "groups"]),
            (False, ["varlen", "groups", "flex", "flex", "flex", "groups", "flex", "groups"]),
        ):
            monkeypatch.setattr(backends, "_has_xformers", lambda has=has_xformers: has)
            near = Together(Causal(), Window(2)).plan(layout_of([3]))
            wide, alibi = Window(2).plan(layout_of([3])), ALiBi(1)
            assert wanted == [
                backends._best(half, plan, None, 0.0), backends._best(full, plan, None, 0.0),
                backends._best(half, near, None, 0.0), backends._best(half, wide, None, 0.0),
                backends._best(full, wide, None, 0.0), backends._best(half, wide, None, 0.1),
                backends._best(half, plan, alibi, 0.0), backends._best(full, plan, alibi, 0.1),
            ]  # fmt: skip


@pytest.mark.parametrize("who", [Full(), Causal(), Window(2)], ids=["full", "causal", "window"])
def test_rows_of_like_length_make_up_one_run_and_nothing_else_changes(who):
    lengths = [1, 2, 3, 5, 6, 7, 8, 8, 9, 12, 15, 16]
    plan, qkv = who.plan(layout_of(lengths)), some_qkv(lengths)
    like, exact = plan.runs(2, like=True), plan.runs(2)
    assert like.groups == [(8, 8, 8), (4, 16, 16)] and len(exact.groups) == 11
    weight = torch.linspace(-1, 1, qkv[:, 0].numel(), dtype=qkv.dtype).view_as(qkv[:, 0])
    found = []
    for runs in (like, exact):
        y_NHK = Explicit.apply(*qkv.unbind(1), runs, 0.0)
        found.append((y_NHK, torch.autograd.grad((y_NHK * weight).sum(), qkv)[0]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    assert plan.runs(2, like=True) is like
    few = who.plan(layout_of([4, 4, 4, 30]))
    assert few.runs(2, like=True).groups == few.runs(2).groups  # nothing would be saved


def test_nobody_is_seen_where_weights_are_dropped():
    """Places in which nobody is show the first token: what it says changes nothing but its own row."""
    lengths = [1, 2, 3, 5, 6, 7]
    plan, qkv = Full().plan(layout_of(lengths)), some_qkv(lengths).detach()
    other = qkv.clone()
    other[0] = 100.0
    said = []
    for one in (qkv, other):
        torch.manual_seed(0)
        said.append(Explicit.apply(*one.unbind(1), plan.runs(2, like=True), 0.5))
    assert torch.equal(said[0][1:], said[1][1:]) and not torch.equal(said[0][0], said[1][0])


def test_rows_of_like_length_are_joined_wherever_they_stand():
    lengths = [1, 9, 2, 10, 3, 11, 4, 12]
    plan, qkv = Full().plan(layout_of(lengths)), some_qkv(lengths)
    like = plan.runs(2, like=True)
    assert like.groups == [(4, 8, 8), (4, 16, 16)]
    outs = [Explicit.apply(*qkv.unbind(1), runs, 0.0) for runs in (like, plan.runs(2))]
    torch.testing.assert_close(*outs, atol=1e-12, rtol=1e-12)
