import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from attends import some_row
from torch import nn

from mmpre.attention import Causal, Full, Layers, Together, Window
from mmpre.attention.bias import ALiBi, RelativeKey, Rotary, T5Buckets
from mmpre.attention.by_tokens import Positions, Roles, Slots
from mmpre.batch import pack
from mmpre.blocks import Block, Encoder
from mmpre.encoder import (
    bert_encoder,
    conformer_encoder,
    llama_encoder,
    modernbert_encoder,
    mosaicbert_encoder,
    vit_encoder,
)
from mmpre.layout import Layout
from mmpre.sublayers.attention import Attention, CrossAttention
from mmpre.sublayers.by_role import ByRole
from mmpre.sublayers.convolution import Convolution
from mmpre.sublayers.feed_forward import FeedForward, GatedFeedForward
from mmpre.sublayers.residual import DropPath, LayerScale, Norm, PostNorm, PreNorm, Scaled


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small gain nothing by more, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TEXTS, IMAGES = [3, 2, 6, 0, 6], [0, 4, 1, 7, 1]
MEMORY = [4, 0, 3, 2, 5]
SIZE = sum(TEXTS) + sum(IMAGES)


def layouts():
    return (
        Layout({"text": torch.tensor(TEXTS), "image": torch.tensor(IMAGES)}),
        Layout({"memory": torch.tensor(MEMORY)}),
    )


def pre(sublayer):
    return PreNorm(sublayer, 32)


def with_attention(**more):
    return Encoder([Block([pre(Attention(32, 4, **more)), pre(FeedForward(32, 48))]) for _ in range(2)], nn.RMSNorm(32))


def with_cross():
    blocks = [
        Block([pre(Attention(32, 4)), pre(CrossAttention(32, 4, memory_width=16)), pre(GatedFeedForward(32, 48))])
        for _ in range(2)
    ]
    return Encoder(blocks)


def by_role():
    own = {
        "text": Block([pre(Attention(32, 4, within=Window(1))), pre(FeedForward(32, 48))]),
        "image": pre(Convolution(32, 3)),
    }
    across = Attention(32, 4, within=Roles({"text": ("image",), "image": ("text",)}))
    return Encoder([Block([ByRole(own)]), Block([pre(across), ByRole({"image": pre(FeedForward(32, 48))})])])


ENCODERS = {
    "bert": lambda: bert_encoder(32, 2, 4, dropout=0.2, attention_dropout=0.2),
    "vit": lambda: vit_encoder(32, 2, 4, drop_path=0.5, layer_scale=0.1),
    "llama": lambda: llama_encoder(32, 2, 4, kv_heads=2),
    "modernbert": lambda: modernbert_encoder(32, 3, 4, every=2, reach=2, dropout=0.1),
    "mosaicbert": lambda: mosaicbert_encoder(32, 2, 4, dropout=0.1),
    "conformer": lambda: conformer_encoder(32, 2, 4, kernel=5, left=3, right=1),
    "causal conformer": lambda: conformer_encoder(32, 2, 4, kernel=4, causal=True, dropout=0.0),
    "alibi": lambda: with_attention(bias=ALiBi(4)),
    "t5": lambda: with_attention(bias=T5Buckets(4, buckets=8, longest=9)),
    "relative key": lambda: with_attention(bias=RelativeKey(8, left=2, right=1)),
    "rotary within a window": lambda: with_attention(rotary=Rotary(8), within=Window(1)),
    "gated": lambda: Encoder([Block([PostNorm(Attention(32, 4), 32), pre(GatedFeedForward(32, 48, F.silu))])]),
    "cross-attention": with_cross,
    "by role": by_role,
    "closing with a norm": lambda: Encoder([Block([pre(Attention(32, 4)), Norm(nn.LayerNorm(32))])]),
}  # fmt: skip
encoders = pytest.mark.parametrize("kind", ENCODERS)


def some(kind, who=None):
    torch.manual_seed(0)
    encoder = ENCODERS[kind]().double()
    layout, other = layouts()
    plan = (who or Full()).plan(layout).reading(torch.randn(sum(MEMORY), 16, dtype=torch.float64), other)
    return encoder, torch.randn(SIZE, 32, dtype=torch.float64, requires_grad=True), layout, plan


@encoders
def test_places_and_layers_can_be_asked_for(kind):
    encoder, x_ND, layout, plan = some(kind)
    encoder.eval()
    depth = len(encoder.blocks)
    whole = encoder(x_ND, layout, plan, read=range(depth + 1))
    tensors = [x_ND, *encoder.parameters()]
    for places in ([0, 8, SIZE - 1, 8], []):
        at = torch.tensor(places, dtype=torch.int64)
        weight = torch.randn(len(places), 32, dtype=torch.float64)
        got = encoder(x_ND, layout, plan, at=at)
        torch.testing.assert_close(got, whole.last[at])
        grads = [
            torch.autograd.grad((y * weight).sum(), tensors, retain_graph=True, allow_unused=True)
            for y in (got, whole.last[at])
        ]
        for mine, want in zip(*grads, strict=True):
            zero = torch.zeros(()) if want is None else torch.zeros_like(want)
            torch.testing.assert_close(zero if mine is None else mine, zero if want is None else want)
        for i in range(depth + 1):
            some_read = encoder(x_ND, layout, plan, at=at, read=[i])
            torch.testing.assert_close(some_read.layer[i], whole.layer[i])
            torch.testing.assert_close(some_read.last, whole.last[at])


@encoders
@pytest.mark.parametrize(
    "who", [Full(), Slots("image"), Layers([Window(1), Together(Causal(), Window(2))])], ids=["full", "slots", "layers"]
)
def test_a_changed_row_changes_no_other_row_and_equals_the_row_alone(kind, who):
    if isinstance(who, Layers) and kind in ("modernbert", "gated", "closing with a norm"):
        pytest.skip("another depth")
    encoder, x_ND, layout, plan = some(kind, who)
    encoder.eval()
    together = encoder(x_ND, layout, plan)
    row = 2
    mine_N = layout.row_N == row
    changed = torch.where(mine_N[:, None], x_ND + torch.randn(32), x_ND)
    after = encoder(changed, layout, plan)
    assert torch.equal(after[~mine_N], together[~mine_N])
    assert (after[mine_N] != together[mine_N]).any(1).all()
    alone, other = (
        Layout({"text": torch.tensor([6]), "image": torch.tensor([1])}),
        Layout({"memory": torch.tensor([3])}),
    )
    start = sum(MEMORY[:row])
    plan_alone = who.plan(alone).reading(plan.memory.state_MD[start : start + 3], other)
    torch.testing.assert_close(encoder(x_ND[mine_N], alone, plan_alone), together[mine_N])


def test_a_changed_memory_changes_its_own_row_alone():
    encoder, x_ND, layout, plan = some("cross-attention")
    before = encoder(x_ND, layout, plan)
    state_MD = plan.memory.state_MD.clone()
    state_MD[4:7] += 1  # row 2's; row 1 has none
    moved_N = (before != encoder(x_ND, layout, plan.reading(state_MD, layouts()[1]))).any(1)
    assert torch.equal(moved_N, layout.row_N == 2)
    with pytest.raises(ValueError, match=r"CrossAttention: has nothing to read; give the encoder plan\.reading"):
        encoder(x_ND, layout, Full().plan(layout))
    with pytest.raises(ValueError, match=r"Plan\.reading: wanted states of the same 5 rows, got 1 rows"):
        plan.reading(state_MD, Layout({"memory": torch.tensor([18])}))


@encoders
@pytest.mark.parametrize("autocast", [False, True])
def test_recomputing_gives_the_same_losses_and_gradients_bit_for_bit(kind, autocast):
    encoder, x_ND, layout, plan = some(kind)
    encoder.float().train()
    x_ND = x_ND.detach().float().requires_grad_()
    plan = plan.reading(plan.memory.state_MD.float().requires_grad_(), layouts()[1])
    results = []
    for encoder.recompute in (False, True):
        encoder.zero_grad()
        x_ND.grad = plan.memory.state_MD.grad = None
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y_ND = encoder(x_ND, layout, plan, at=torch.tensor([0, 5, 9]))
        after = torch.rand(3)
        y_ND.float().square().sum().backward()
        grads = [one.grad for one in (x_ND, plan.memory.state_MD, *encoder.parameters()) if one.grad is not None]
        results.append([y_ND, after, torch.rand(3), *grads])
    for kept, again in zip(*results, strict=True):
        assert torch.equal(kept, again)


def test_recomputing_keeps_less():
    encoder, x_ND, layout, plan = some("bert")
    sizes = []
    for encoder.recompute in (False, True):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.numel()) or x, lambda x: x):
            encoder(x_ND, layout, plan)
        sizes.append(sum(kept))
    assert sizes[1] < sizes[0] / 5


@pytest.mark.parametrize("kernel, causal", [(1, False), (5, False), (31, False), (4, True), (1, True)])
def test_the_convolution_is_each_rows_own(kernel, causal):
    torch.manual_seed(0)
    convolution = Convolution(8, kernel, causal=causal).double()
    layout = Layout({"text": torch.tensor([3, 0, 1, 9, 9])})
    x_ND = torch.randn(22, 8, dtype=torch.float64)
    before = kernel - 1 if causal else kernel // 2
    want = [
        F.conv1d(F.pad(row_TD.T, (before, kernel - 1 - before)), convolution.depthwise.weight, groups=8).T
        for row_TD in x_ND.split([3, 0, 1, 9, 9]) if len(row_TD)
    ]  # fmt: skip
    torch.testing.assert_close(convolution.along(x_ND, layout), torch.cat(want))
    assert convolution(x_ND[:0], Layout({"text": torch.tensor([0])}), None).shape == (0, 8)


def test_drop_path_drops_whole_rows_while_training():
    torch.manual_seed(0)
    layout = Layout({"text": torch.full((4000,), 2)})
    drop = DropPath(Norm(nn.Identity()), 0.25)
    x_ND, plan = torch.ones(8000, 1), Full().plan(layout)
    y_B2 = drop(x_ND, layout, plan).view(4000, 2)
    assert torch.equal(y_B2[:, 0], y_B2[:, 1])
    assert y_B2.unique().tolist() == pytest.approx([0, 4 / 3])
    assert y_B2.mean() == pytest.approx(1, abs=0.03)
    torch.manual_seed(5)
    whole = drop(x_ND, layout, plan)
    torch.manual_seed(5)
    at = torch.tensor([7999, 0, 17])
    assert torch.equal(drop(x_ND, layout, plan, at), whole[at])
    assert torch.equal(drop.eval()(x_ND, layout, plan), x_ND)
    shares = [block.sublayers[0].sublayer.p for block in vit_encoder(8, 4, 2, drop_path=0.3).blocks]
    assert shares == pytest.approx([0, 0.1, 0.2, 0.3])


def test_scales_and_gates_are_what_they_say():
    torch.manual_seed(0)
    layout = Layout({"text": torch.tensor([5])})
    x_ND, plan = torch.randn(5, 8), None
    forward = FeedForward(8, 12)
    torch.testing.assert_close(Scaled(forward, 0.5)(x_ND, layout, plan), 0.5 * forward(x_ND, layout, plan))
    scale = LayerScale(forward, 8, 0.1)
    with torch.no_grad():
        scale.factor_D[3] = 2
    factor_D = torch.tensor([0.1] * 3 + [2.0] + [0.1] * 4)
    torch.testing.assert_close(scale(x_ND, layout, plan), factor_D * forward(x_ND, layout, plan))
    gated = GatedFeedForward(8, 12, F.silu, up_bias=True)
    a, b = (F.linear(x_ND, w, c) for w, c in zip(gated.up.weight.split(12), gated.up.bias.split(12), strict=True))
    torch.testing.assert_close(gated(x_ND, layout, plan), (F.silu(a) * b) @ gated.down.weight.T)
    assert gated.down.bias is None and GatedFeedForward(8, 12).up.bias is None


def test_layers_differ_as_the_plan_says():
    """Of two layers the lower one or the upper one looks to the right: what the first token sees in one layer."""
    encoder, x_ND, layout, _ = some("llama")
    encoder.eval()
    last = 2  # of the first row
    for attends, moved in (
        ([Causal(), Causal()], [False, False]), ([Full(), Causal()], [True, True]), ([Causal(), Full()], [False, True]),
    ):  # fmt: skip
        plan = Layers(attends).plan(layout)
        changed = x_ND.detach().clone()
        changed[last] += 1
        one, other = (encoder(x, layout, plan, read=[1, 2]) for x in (x_ND, changed))
        assert [bool((one.layer[i][0] != other.layer[i][0]).any()) for i in (1, 2)] == moved
    with pytest.raises(ValueError, match="each of the encoder's 2 layers, got 1"):
        encoder(x_ND, layout, Layers([Full()]).plan(layout))


def test_positions_from_a_field_reach_rotary_embeddings():
    """A row whose tokens stand three places further on: the same states; another order of places: others."""
    encoder = some("rotary within a window")[0].eval()
    row = some_row(5, 6, 0)
    plain = pack([row], Full().plan)
    x_ND = torch.randn(6, 32, dtype=torch.float64)
    want = encoder(x_ND, plain.layout, plain.plan)
    for place_N, same in ((torch.arange(6) + 3, True), (torch.arange(6).flip(0), False)):
        moved = replace(row, seen={**row.seen, "text": row.seen["text"].with_values(place=place_N)})
        batch = pack([moved], Positions({"text": "place"}, Full()).plan)
        got = encoder(x_ND, batch.layout, batch.plan)
        assert torch.allclose(got, want, atol=1e-12) == same


def test_start_weights_are_those_of_the_papers():
    encoder = modernbert_encoder(64, 8, 4)
    for name, weight in encoder.named_parameters():
        if weight.ndim == 2:
            std = 0.02 / (math.sqrt(16) if name.endswith(("out.weight", "down.weight")) else 1)
            assert weight.detach().std() == pytest.approx(0.88 * std, rel=0.05)  # cut off at two deviations
            assert weight.abs().max() <= 2 * std
    assert not any(name.endswith("bias") for name, _ in encoder.named_parameters())
    assert {tuple(w.shape) for n, w in llama_encoder(48, 1, 4).named_parameters() if "up" in n} == {(256, 48)}
    assert all(
        w.detach().std() == pytest.approx(0.02, rel=0.1) for w in llama_encoder(48, 1, 4).parameters() if w.ndim == 2
    )


def test_refused_numbers_are_named():
    with pytest.raises(ValueError, match="heads must be a multiple of kv_heads, got 4 heads and 3"):
        Attention(32, 4, kv_heads=3)
    with pytest.raises(ValueError, match="CrossAttention: width must be a multiple of heads, got width 30 and 4 heads"):
        CrossAttention(30, 4)
    with pytest.raises(ValueError, match=r"Convolution: kernel must be odd, or causal, .* got 4"):
        Convolution(32, 4)
    with pytest.raises(ValueError, match=r"DropPath: p must be .* got 1\.0"):
        DropPath(FeedForward(8, 8), 1.0)
