import pytest
import torch
from parity_text import copy_encoder, vary
from torch import nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from mmpre.attention import Causal, Full
from mmpre.blocks import Block, Encoder
from mmpre.encoder import bert_encoder
from mmpre.layout import Layout
from mmpre.sublayers.attention import Attention
from mmpre.sublayers.feed_forward import FeedForward
from mmpre.sublayers.residual import PostNorm, PreNorm

LENGTHS = [2, 5, 5, 9]
SIZE = 21


def layout_of(lengths):
    return Layout({"text": torch.tensor(lengths, dtype=torch.int64)})


def some_bert(**more):
    torch.manual_seed(0)
    return bert_encoder(32, 2, 4, **more).double()


def some_input(lengths=LENGTHS):
    torch.manual_seed(1)
    layout = layout_of(lengths)
    return torch.randn(sum(lengths), 32, dtype=torch.float64, requires_grad=True), layout, Full().plan(layout)


def some_prenorm():
    """Blocks of which the last ones mix nothing, with a closing norm."""
    torch.manual_seed(0)

    def pre(sublayer):
        return PreNorm(sublayer, 32, 0.0)

    mixing = [Block([pre(FeedForward(32, 48)), pre(Attention(32, 4)), pre(FeedForward(32, 48))]) for _ in range(2)]
    return Encoder([*mixing, Block([pre(FeedForward(32, 48, nn.SiLU()))])], norm=nn.LayerNorm(32)).double()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model, config", [(BertModel, BertConfig), (RobertaModel, RobertaConfig)])
def test_every_layer_and_gradient_equals_transformers_on_a_ragged_batch(model, config, attention):
    torch.manual_seed(0)
    config = config(
        vocab_size=99, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
        max_position_embeddings=64, attn_implementation=attention,
    )  # fmt: skip
    theirs = model(config, add_pooling_layer=False).eval()
    ours = bert_encoder(64, 3, 4, eps=config.layer_norm_eps).eval()
    vary(theirs)
    copy_encoder(ours, theirs.encoder)
    layout = layout_of([3, 7, 7, 20, 31])
    valid_BT = torch.arange(31) < layout.lengths_B[:, None]
    ids_BT = torch.where(valid_BT, torch.randint(5, 99, valid_BT.shape), 1)  # 1 is RoBERTa's padding
    want = theirs(ids_BT, attention_mask=valid_BT.long(), output_hidden_states=True)
    with torch.no_grad():
        x_ND = theirs.embeddings(ids_BT)[valid_BT]
    got = ours(x_ND, layout, Full().plan(layout), read=range(4))
    for i, state_BTD in enumerate(want.hidden_states):
        torch.testing.assert_close(got.layer[i], state_BTD[valid_BT], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.last, want.last_hidden_state[valid_BT], atol=1e-5, rtol=1e-5)

    weight_ND = torch.randn_like(x_ND)
    (got.last * weight_ND).sum().backward()
    (want.last_hidden_state[valid_BT] * weight_ND).sum().backward()
    for layer, block in zip(theirs.encoder.layer, ours.blocks, strict=True):
        parts = [getattr(layer.attention.self, name) for name in ("query", "key", "value")]
        want_grad = torch.cat([part.weight.grad for part in parts])
        scale = want_grad.abs().max()
        assert scale > 1e-3
        torch.testing.assert_close(
            block.sublayers[0].sublayer.qkv.weight.grad / scale, want_grad / scale, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("places", [[0, 3, 20, 7], [], list(range(SIZE)), [4, 4]], ids=str)
@pytest.mark.parametrize("make", [some_bert, some_prenorm])
def test_states_at_places_equal_those_of_the_whole_forward_and_gradient(make, places):
    encoder = make().eval()
    x_ND, layout, plan = some_input()
    at = torch.tensor(places, dtype=torch.int64)
    tensors = [x_ND, *encoder.parameters()]
    weight = torch.randn(len(places), 32, dtype=torch.float64)
    some, whole = encoder(x_ND, layout, plan, at=at), encoder(x_ND, layout, plan)[at]
    torch.testing.assert_close(some, whole)
    grads = [torch.autograd.grad((y * weight).sum(), tensors) for y in (some, whole)]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("make, narrowed", [(some_bert, (1, 1)), (some_prenorm, (1, 2))])
def test_what_follows_the_last_mixing_sublayer_runs_on_the_places_alone(make, narrowed):
    encoder = make().eval()
    x_ND, layout, plan = some_input()
    rows = {}
    for i, block in enumerate(encoder.blocks):
        for j, wrapped in enumerate(block.sublayers):
            linear = wrapped.sublayer.out if wrapped.mixes else wrapped.sublayer.up
            linear.register_forward_hook(lambda _, x, y, at=(i, j): rows.update({at: len(x[0])}))
    encoder(x_ND, layout, plan, at=torch.tensor([1, 2, 3]))
    after = [(i, j) for (i, j), count in rows.items() if count == 3]
    mixing = [(i, j) for i, b in enumerate(encoder.blocks) for j, s in enumerate(b.sublayers) if s.mixes]
    assert after == [at for at in rows if at >= max(mixing)]
    assert all(rows[at] == SIZE for at in rows if at < max(mixing))
    assert after[-1][0] == narrowed[1]


@pytest.mark.parametrize("make", [some_bert, some_prenorm])
def test_layers_can_be_read_whole_beside_places(make):
    encoder = make().eval()
    x_ND, layout, plan = some_input()
    at = torch.tensor([20, 5])
    depth = len(encoder.blocks)
    whole = encoder(x_ND, layout, plan, read=range(depth + 1))
    assert whole.layer[0] is x_ND
    for read in ([], [1], [depth], range(depth + 1)):
        got = encoder(x_ND, layout, plan, at=at, read=read)
        torch.testing.assert_close(got.last, whole.last[at])
        assert set(got.layer) == set(read)
        for i in read:
            torch.testing.assert_close(got.layer[i], whole.layer[i])
    with pytest.raises(ValueError, match=rf"layers 0 \(what comes in\) to {depth}, asked for \[-1, 1\]"):
        encoder(x_ND, layout, plan, read=[1, -1])


@pytest.mark.parametrize("make", [some_bert, some_prenorm])
@pytest.mark.parametrize("who", [Full(), Causal()])
def test_a_row_among_others_equals_the_row_alone_and_no_row_feels_its_neighbours(make, who):
    encoder = make().eval()
    x_ND, layout, _ = some_input()
    together = encoder(x_ND, layout, who.plan(layout))
    alone = layout_of([5])
    torch.testing.assert_close(encoder(x_ND[7:12], alone, who.plan(alone)), together[7:12])
    changed = x_ND.detach().clone()
    changed[7:12] += 1
    after = encoder(changed, layout, who.plan(layout))
    others = [*range(7), *range(12, SIZE)]
    assert torch.equal(after[others], together[others])
    assert (after[7:12] != together[7:12]).any(1).all()


@pytest.mark.parametrize("make", [some_bert, some_prenorm])
@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_a_batch_without_tokens_goes_through(make, lengths):
    encoder = make()
    x_ND, layout, plan = some_input(lengths)
    y_ND = encoder(x_ND, layout, plan)
    assert y_ND.shape == (0, 32)
    assert encoder(x_ND, layout, plan, at=torch.tensor([], dtype=torch.int64)).shape == (0, 32)
    y_ND.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in encoder.parameters())


def test_the_start_weights_are_berts():
    encoder = bert_encoder(64, 2, 4, hidden=100)
    for name, parameter in encoder.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            assert parameter.detach().std() == pytest.approx(0.02, rel=0.05)
    assert encoder.blocks[0].sublayers[1].sublayer.up.weight.shape == (100, 64)
    assert sum(p.numel() for p in bert_encoder(64, 1, 4).parameters()) == 12 * 64**2 + 13 * 64


def test_dropout_acts_while_training_only_and_follows_the_seed():
    encoder = some_bert(dropout=0.3, attention_dropout=0.0)
    x_ND, layout, plan = some_input()

    def run():
        torch.manual_seed(5)
        return encoder(x_ND, layout, plan)

    once = run()
    assert torch.equal(once, run())
    assert not torch.equal(once, encoder(x_ND, layout, plan))
    only_attention = some_bert(dropout=0.0, attention_dropout=0.3)
    assert not torch.equal(only_attention(x_ND, layout, plan), only_attention(x_ND, layout, plan))
    encoder.eval(), only_attention.eval()
    assert torch.equal(encoder(x_ND, layout, plan), encoder(x_ND, layout, plan))
    assert torch.equal(encoder(x_ND, layout, plan), only_attention(x_ND, layout, plan))


def test_without_dropout_nothing_is_drawn():
    encoder = some_bert(dropout=0.0, attention_dropout=0.0)
    x_ND, layout, plan = some_input()
    before = torch.get_rng_state()
    encoder(x_ND, layout, plan)
    assert torch.equal(before, torch.get_rng_state())


def test_bfloat16_autocast_stays_near_float32_with_float32_residuals():
    encoder = some_bert().float().eval()
    x_ND, layout, plan = some_input()
    want = encoder(x_ND.float(), layout, plan)
    with torch.autocast("cpu", torch.bfloat16):
        got = encoder(x_ND.float(), layout, plan)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=0.05, rtol=0.05)


def test_refused_numbers_are_named():
    with pytest.raises(ValueError, match="width must be a multiple of heads, got width 30 and 4 heads"):
        Attention(30, 4)
    with pytest.raises(ValueError, match=r"Attention: dropout must be .* got 1\.0"):
        Attention(32, 4, dropout=1.0)
    with pytest.raises(ValueError, match=r"Dropout: p must be .* got -0\.1"):
        PostNorm(FeedForward(32, 64), 32, dropout=-0.1)
