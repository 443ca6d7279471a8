import pickle

import pytest
import torch
from attends import ATTENDS, SIZES, Facts, by_hand, some_batch, some_bias
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import flex_attention

from mmpre.attention import Attend, Causal, Full, Layers, Plan, Together, Window
from mmpre.attention import backends as attention_backends
from mmpre.attention.backends import attend, attention_probabilities
from mmpre.attention.by_tokens import Graph, PerRow, Positions, Prefix
from mmpre.layout import Layout

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 4e-2}
BIASES = [None, "alibi", "t5", "relative key"]
backends = pytest.mark.parametrize("backend", ["groups", "flex", "dense"])
kinds = pytest.mark.parametrize("kind", ATTENDS)
# flex_attention without a compiler takes a tenth of a second a call: with it, each attend and each bias is seen once
WITH_FLEX = [*((kind, None) for kind in ATTENDS), *(("graph", bias) for bias in BIASES[1:]), ("positions", "t5")]
ALL = [
    *((kind, bias, "groups") for kind in ATTENDS for bias in BIASES),
    *((kind, bias, backend) for kind, bias in WITH_FLEX for backend in ("flex", "dense")),
]


@pytest.fixture
def force(monkeypatch):
    return lambda name: monkeypatch.setenv("MMPRE_ATTENTION", name)


def some_qkv(batch, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch.layout.size, 3, 2, 8, dtype=torch.float64, generator=g).to(dtype).requires_grad_()


def gradients(y_NHK, tensors):
    weight = torch.linspace(-1, 1, y_NHK.numel(), dtype=y_NHK.dtype).view_as(y_NHK)
    return torch.autograd.grad((y_NHK * weight).sum(), tensors)


@kinds
def test_an_attend_allows_what_its_definition_allows(kind):
    who, allows = ATTENDS[kind]
    assert isinstance(who, Attend)
    batch = some_batch(who)
    for row, key in enumerate(batch.keys):
        f = Facts(key)
        n = f.texts + f.nodes
        want = torch.tensor([[allows(f, i, j) for j in range(n)] for i in range(n)], dtype=torch.bool).view(n, n)
        assert torch.equal(batch.plan.dense(row), want)


@pytest.mark.parametrize("kind, bias, backend", ALL)
def test_every_attend_with_every_bias_equals_its_definition_forward_and_gradient(kind, bias, backend, force):
    who, allows = ATTENDS[kind]
    batch = some_batch(who)
    qkv = some_qkv(batch)
    bias, added = some_bias(bias) if bias else (None, None)
    learned = [] if bias is None else list(bias.parameters())
    want = by_hand(batch, allows, qkv, added, placed=kind == "positions")
    force(backend)
    got = attend(*qkv.unbind(1), batch.plan, bias=bias)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    for ours, theirs in zip(gradients(got, [qkv, *learned]), gradients(want, [qkv, *learned]), strict=True):
        assert ours.any()
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", BIASES)
@kinds
def test_fewer_digits_stay_near_the_float64_reference(kind, bias, dtype, force):
    batch = some_batch(ATTENDS[kind][0])
    qkv = some_qkv(batch)
    bias = some_bias(bias)[0] if bias else None
    force("dense")
    want = attend(*qkv.unbind(1), batch.plan, bias=bias)
    want_grad = gradients(want, [qkv])[0]
    force("groups")
    less = qkv.detach().to(dtype).requires_grad_()
    got = attend(*less.unbind(1), batch.plan, bias=bias if bias is None else bias.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    torch.testing.assert_close(
        gradients(got, [less])[0].double(), want_grad, atol=2 * TOLERANCE[dtype], rtol=2 * TOLERANCE[dtype]
    )


@pytest.mark.parametrize("kind, bias", WITH_FLEX)
def test_a_changed_row_changes_no_other_row(kind, bias):
    batch = some_batch(ATTENDS[kind][0])
    bias = some_bias(bias)[0] if bias else None
    qkv = some_qkv(batch).detach()
    row_N = batch.layout.row_N
    for row in (2, 5):
        changed = torch.where((row_N == row)[:, None, None, None], qkv + 1, qkv)
        before, after = (attend(*x.unbind(1), batch.plan, bias=bias) for x in (qkv, changed))
        moved_N = (before != after).flatten(1).any(1)
        assert not moved_N[row_N != row].any()
        assert moved_N[row_N == row].any() or (kind == "across" and row == 2)  # a row that has one role alone


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", ["causal", "graph", "positions"])
def test_probabilities_are_those_that_attention_uses(kind, bias):
    batch = some_batch(ATTENDS[kind][0])
    bias = some_bias(bias)[0] if bias else None
    q, k, v = some_qkv(batch).unbind(1)
    y_NHK = attend(q, k, v, batch.plan, bias=bias)
    weights = attention_probabilities(q, k, batch.plan, bias)
    for row, (weight_Hnn, start) in enumerate(zip(weights, batch.layout.starts_B.tolist(), strict=True)):
        here = slice(start, start + weight_Hnn.shape[1])
        torch.testing.assert_close(torch.einsum("hqk,khd->qhd", weight_Hnn, v[here]), y_NHK[here])
        assert not weight_Hnn[:, ~batch.plan.dense(row)].any()


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["window", "graph"])
@torch.no_grad()
def test_dropout_keeps_the_mean_and_gives_no_weight_to_the_forbidden(kind, dtype, bias, force):
    batch = some_batch(ATTENDS[kind][0], [(40, 9)] * 20)
    bias = some_bias(bias)[0].to(dtype) if bias else None
    q, k, v = some_qkv(batch, dtype).detach().unbind(1)
    want = attend(q, k, torch.ones_like(v), batch.plan, bias=bias)
    torch.manual_seed(0)
    got = attend(q, k, torch.ones_like(v), batch.plan, bias=bias, dropout=0.25)
    assert (want != got).any()
    assert (got - want).float().mean() == pytest.approx(0, abs=0.03)  # four times its spread over seeds
    marked = torch.zeros_like(v)
    marked[batch.layout.index["node"]] = 1  # who does not see nodes must read 0 of them
    sees_N = attend(q, k, marked, batch.plan, bias=bias).flatten(1).any(1)
    assert not attend(q, k, marked, batch.plan, bias=bias, dropout=0.25).flatten(1).any(1)[~sees_N].any()


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("kind", ["full", "window", "graph"])
def test_with_dropout_gradients_are_those_of_what_was_kept(kind, bias):
    batch = some_batch(ATTENDS[kind][0])
    bias = some_bias(bias)[0] if bias else None
    learned = [p for p in (bias.parameters() if bias is not None else [])]

    def call(qkv_N3HK, *_):
        torch.manual_seed(1)
        return attend(*qkv_N3HK.unbind(1), batch.plan, bias=bias, dropout=0.3)

    assert torch.autograd.gradcheck(call, (some_qkv(batch), *learned), fast_mode=True)


def test_masks_are_made_only_where_they_are_needed_and_shared_by_rows_that_agree():
    layout = Layout({"text": torch.tensor([3, 3, 4, 9, 9])})
    assert Full().plan(layout).masks == [None, None, None]
    shapes = [None if mask is None else tuple(mask.shape) for mask in Window(3).plan(layout).masks]
    assert shapes == [None, None, (1, 1, 9, 9)]
    per_row = some_batch(PerRow((Full(), Causal()), "causal"), [(2, 2), (3, 3), (2, 2), (3, 3)]).plan
    assert [mask is None for mask in per_row.masks] == [True, False]  # rows 0 and 2 see all of themselves


def test_equal_attends_share_a_plan_between_layers_and_also_is_made_once():
    layout = Layout({"text": torch.tensor([3, 9])})
    plan = Layers([Causal(), Full(), Causal()]).plan(layout)
    assert plan.of_layer(0, 3) is plan.of_layer(2, 3)
    with pytest.raises(ValueError, match="Layers: needs an attend for each of the encoder's 2 layers, got 3"):
        plan.of_layer(0, 2)
    window = Window(2)
    first = plan.of_layer(0, 3).also(window)
    assert first is plan.of_layer(0, 3).also(window)
    assert first.rule == Together(Causal(), window).plan(layout).rule
    x = torch.zeros(12, 1, 2)
    with pytest.raises(ValueError, match=r"differs by layer; take one by plan\.of_layer"):
        attend(x, x, x, plan)


@kinds
def test_plans_can_be_pickled_and_moved(kind):
    plan = pickle.loads(pickle.dumps(some_batch(ATTENDS[kind][0]).plan))
    moved = plan.to("meta")
    assert moved.groups == plan.groups
    assert moved.position_N.device.type == "meta"
    assert {mask.device.type for mask in moved.masks if mask is not None} <= {"meta"}
    assert plan.to("cpu") is plan


@backends
def test_cross_attention_reads_the_same_rows_of_another_sequence(backend, force):
    """By its definition, row by row; a row without anything to read reads zeros."""
    reads = [(3, 2), (3, 2), (1, 0), (0, 4), (5, 7), (2, 2)]
    layout, other = (Layout({"a": torch.tensor(lengths)}) for lengths in zip(*reads, strict=True))
    plan = Plan(layout, keys=other)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(size, 2, 8, dtype=torch.float64, generator=g, requires_grad=True) for size in (14, 17, 17))
    want, i, j = [], 0, 0
    for n, m in reads:
        weight = torch.einsum("qhd,khd->hqk", q[i : i + n], k[j : j + m]).div(8**0.5).softmax(-1)
        want.append(torch.einsum("hqk,khd->qhd", weight, v[j : j + m]))
        i, j = i + n, j + m
    force(backend)
    got = attend(q, k, v, plan)
    assert not got[6].any()
    torch.testing.assert_close(got, torch.cat(want))
    for ours, theirs in zip(gradients(got, [q, k, v]), gradients(torch.cat(want), [q, k, v]), strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="a bias needs distances, which two sequences do not have"):
        attend(q, k, v, plan, bias=some_bias("alibi")[0])


# CUDA: what is asked for, without a GPU.


@pytest.mark.parametrize("kind, bias", WITH_FLEX)
def test_flex_takes_cuda_tensors_and_is_compiled_there(kind, bias, force, monkeypatch):
    compiled = []

    def create(*args, _compile):
        compiled.append(_compile)
        return torch.nn.attention.flex_attention.create_block_mask(*args)

    monkeypatch.setattr("mmpre.attention.create_block_mask", create)
    monkeypatch.setattr(attention_backends, "_compiled_flex", lambda: compiled.append("flex") or flex_attention)
    force("flex")
    batch = some_batch(ATTENDS[kind][0])
    bias = None if bias is None else some_bias(bias)[0]
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in [] if bias is None else bias.modules():  # module.to cannot swap in fake parameters
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: torch.empty_like(one, device="cuda") for name, one in tensors.items()})
        qkv = torch.empty(batch.layout.size, 3, 2, 8, dtype=torch.float64, device="cuda")
        y_NHK = attend(*qkv.unbind(1), batch.plan.to("cuda"), bias=bias)
        assert (y_NHK.shape, y_NHK.dtype, y_NHK.device.type) == (qkv[:, 0].shape, qkv.dtype, "cuda")
        y_NHK.flatten(1)
    assert sorted(map(str, compiled)) == ["True", "flex"]
    with pytest.raises(ValueError, match=r"flex attention: has no dropout, got 0\.1; unset MMPRE_ATTENTION"):
        attend(*some_qkv(batch).unbind(1), batch.plan, dropout=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, bias", [("graph", None), ("window", "alibi"), ("per row", "t5"), ("together", "relative key")]
)
def test_compiled_flex_equals_the_reference(kind, bias, force, monkeypatch, request):
    """On a CPU it compiles the forward pass alone."""
    if request.config.getoption("jaxtyping_packages", None):
        pytest.skip("torch.compile cannot rewrite functions whose shapes are checked (torch 2.10: it breaks inside)")
    monkeypatch.setattr(attention_backends, "flex_attention", torch.compile(flex_attention))
    batch = some_batch(ATTENDS[kind][0], [(3, 2), (5, 0), (0, 5), (40, 30), (60, 10)])
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch.layout.size, 2, 16, generator=g) for _ in range(3))
    bias = None if bias is None else some_bias(bias, width=16)[0].float()
    with torch.no_grad():
        force("dense")
        want = attend(q, k, v, batch.plan, bias=bias)
        force("flex")
        torch.testing.assert_close(attend(q, k, v, batch.plan, bias=bias), want, atol=3e-6, rtol=3e-6)


def test_xformers_bias_for_cross_attention_and_where_it_has_none():
    pytest.importorskip("xformers.ops")
    layout, other = (Layout({"a": torch.tensor(lengths)}) for lengths in ([2, 3, 3], [4, 1, 2]))
    plan = Plan(layout, keys=other)
    bias_NM = plan.xformers_bias.materialize((8, 7))
    assert torch.equal(bias_NM == 0, torch.block_diag(*(plan.dense(row).float() for row in range(3))) == 1)
    assert Window(2).plan(layout).xformers_bias is None
    assert some_batch(Prefix("text")).plan.xformers_bias is None
    assert Plan(layout, keys=Layout({"a": torch.tensor([4, 0, 2])})).xformers_bias is None


@pytest.mark.parametrize("backend", ["xformers", "varlen"])
def test_kernels_that_lack_a_rule_or_a_bias_say_so(backend, force):
    pytest.importorskip("xformers.ops")
    force(backend)
    layout = Layout({"text": torch.tensor([9])})
    q = torch.zeros(9, 2, 8)
    with pytest.raises(
        ValueError, match=rf"{backend} attention: .* got Band\(left=2, right=2\); unset MMPRE_ATTENTION"
    ):
        attend(q, q, q, Window(2).plan(layout))
    with pytest.raises(ValueError, match=rf"{backend} attention: .* got ALiBi; unset MMPRE_ATTENTION"):
        attend(q, q, q, Full().plan(layout), bias=some_bias("alibi")[0])


def test_refusals_name_what_came():
    layout = Layout({"text": torch.tensor([3])})
    with pytest.raises(ValueError, match=r"Window: reach must be at least 0 places, got -1"):
        Window(-1)
    with pytest.raises(ValueError, match=r"Prefix: asks the tokens of role 'text', but was given lengths alone"):
        Prefix("text", "mark").plan(layout)
    with pytest.raises(ValueError, match=r"Positions: field 'links' must hold one number for each of \d+ tokens"):
        some_batch(Positions({"node": "links"}, Full()))
    with pytest.raises(ValueError, match=r"Graph: field 'mark' must hold pairs, shape \(E, 2\), got \(19,\)"):
        some_batch(Graph("text", "mark"))
    with pytest.raises(ValueError, match="Graph: field 'edges' counts tokens of 'text' and must not refer"):
        some_batch(Graph("node", None, links={"text": "edges"}))
    with pytest.raises(KeyError, match=r"PerRow: no label 'kind' in the batch, only \['causal'\]"):
        some_batch(PerRow((Full(), Causal()), "kind"))
    with pytest.raises(ValueError, match=r"label 'causal' must be a number from 0 to 0, .* got \[0, 1\]"):
        some_batch(PerRow((Full(),), "causal"))
    with pytest.raises(ValueError, match="PerRow: cannot choose among attends that differ by layer or set positions"):
        some_batch(PerRow((Layers([Causal()] * 2), Full()), "causal"))
    with pytest.raises(ValueError, match=r"Plan\.also: wanted an attend of lengths alone, the same in all layers"):
        Full().plan(layout).also(Layers([Causal()] * 2))
    with pytest.raises(ValueError, match="Together: cannot join attends that differ by layer"):
        Together(Layers([Full()])).plan(layout)
    assert SIZES[2] == (0, 5)  # a row without text is among the rows of these tests
