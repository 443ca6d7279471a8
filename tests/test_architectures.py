"""Encoders of encoder.py, and others composed from the same parts, equal public implementations layer by layer."""

import pytest
import torch
import torch.nn.functional as F
from parity_text import vary
from torch import nn
from torchaudio.models import Conformer
from transformers import (
    LlamaConfig,
    LlamaModel,
    LxmertConfig,
    ModernBertConfig,
    ModernBertModel,
    ViTConfig,
    ViTModel,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
)
from transformers.models.lxmert.modeling_lxmert import LxmertXLayer

from mmpre.attention import Causal, Full
from mmpre.attention.by_tokens import Roles
from mmpre.blocks import Block, Encoder
from mmpre.encoder import (
    conformer_encoder,
    llama_encoder,
    modernbert_encoder,
    mosaicbert_encoder,
    vit_encoder,
)
from mmpre.layout import Layout
from mmpre.sublayers.attention import Attention
from mmpre.sublayers.by_role import ByRole
from mmpre.sublayers.convolution import Convolution
from mmpre.sublayers.feed_forward import FeedForward
from mmpre.sublayers.residual import Norm, PostNorm, PreNorm, Scaled

LENGTHS = [2, 7, 7, 12, 25]


def layout_of(lengths=LENGTHS):
    return Layout({"text": torch.tensor(lengths)})


def valid_of(layout):
    return torch.arange(int(layout.lengths_B.max())) < layout.lengths_B[:, None]


def copy(linear, *theirs):
    """Weights, and biases where there are any, of one or more linear maps (or convolutions of one place)."""
    with torch.no_grad():
        linear.weight.copy_(torch.cat([one.weight.view(len(one.weight), -1) for one in theirs]))
        assert (linear.bias is None) == (theirs[0].bias is None)
        if linear.bias is not None:
            linear.bias.copy_(torch.cat([one.bias for one in theirs]))


def assert_close(got, want):
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def assert_equals(ours, theirs_states, last, x_ND, layout, who):
    """Every layer, the closing norm, and a backward pass that reaches every weight."""
    got = ours.eval()(x_ND, layout, who.plan(layout), read=range(len(ours.blocks)))
    for i, state_ND in enumerate(theirs_states):
        assert_close(got.layer[i], state_ND)
    assert_close(got.last, last)
    assert not torch.allclose(got.layer[1], got.layer[0], atol=0.1)
    with torch.enable_grad():
        ours(x_ND, layout, who.plan(layout)).square().sum().backward()
    untouched = [name for name, weight in ours.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not untouched


def test_vit_equals_transformers():
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=80, layer_norm_eps=1e-6,
        image_size=24, patch_size=8,
    )  # fmt: skip
    theirs = ViTModel(config, add_pooling_layer=False).eval()
    vary(theirs)
    ours = vit_encoder(32, 3, 4, hidden=80)
    for block, layer in zip(ours.blocks, theirs.layers, strict=True):
        attention, forward = block.sublayers
        mine = attention.sublayer
        copy(mine.qkv, *(getattr(layer.attention, f"{name}_proj") for name in "qkv"))
        copy(mine.out, layer.attention.o_proj)
        attention.norm.load_state_dict(layer.layernorm_before.state_dict())
        forward.norm.load_state_dict(layer.layernorm_after.state_dict())
        copy(forward.sublayer.up, layer.mlp.fc1)
        copy(forward.sublayer.down, layer.mlp.fc2)
    ours.norm.load_state_dict(theirs.layernorm.state_dict())
    want = theirs(torch.randn(3, 3, 24, 24), output_hidden_states=True)
    layout = layout_of([10, 10, 10])
    states = [state.detach().flatten(0, 1) for state in want.hidden_states]
    assert_equals(ours, states[:3], want.last_hidden_state.detach().flatten(0, 1), states[0], layout, Full())


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_llama_equals_transformers(kv_heads):
    torch.manual_seed(0)
    turning = {"rope_type": "default", "rope_theta": 300.0}
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=kv_heads,
        intermediate_size=40, rope_parameters=turning, pad_token_id=0,
    )  # fmt: skip
    theirs = LlamaModel(config).eval()
    vary(theirs)
    ours = llama_encoder(32, 3, 4, kv_heads=kv_heads, hidden=40, theta=300.0)
    for block, layer in zip(ours.blocks, theirs.layers, strict=True):
        attention, forward = block.sublayers
        copy(attention.sublayer.qkv, *(getattr(layer.self_attn, f"{name}_proj") for name in "qkv"))
        copy(attention.sublayer.out, layer.self_attn.o_proj)
        attention.norm.load_state_dict(layer.input_layernorm.state_dict())
        forward.norm.load_state_dict(layer.post_attention_layernorm.state_dict())
        copy(forward.sublayer.up, layer.mlp.gate_proj, layer.mlp.up_proj)
        copy(forward.sublayer.down, layer.mlp.down_proj)
    ours.norm.load_state_dict(theirs.norm.state_dict())
    layout = layout_of()
    valid_BT = valid_of(layout)
    ids_BT = torch.randint(1, 50, valid_BT.shape) * valid_BT
    want = theirs(ids_BT, attention_mask=valid_BT.long(), output_hidden_states=True)
    states = [state_BTD[valid_BT].detach() for state_BTD in want.hidden_states]
    assert_equals(ours, states[:3], want.last_hidden_state[valid_BT].detach(), states[0], layout, Causal())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_modernbert_equals_transformers(attention):
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=40,
        local_attention=8, global_attn_every_n_layers=3, pad_token_id=0, attn_implementation=attention,
    )  # fmt: skip
    theirs = ModernBertModel(config).eval()
    vary(theirs)
    ours = modernbert_encoder(32, 4, 4, hidden=40, reach=4)
    for block, layer in zip(ours.blocks, theirs.layers, strict=True):
        mine, forward = block.sublayers
        copy(mine.sublayer.qkv, layer.attn.Wqkv)
        copy(mine.sublayer.out, layer.attn.Wo)
        mine.norm.load_state_dict(layer.attn_norm.state_dict())
        forward.norm.load_state_dict(layer.mlp_norm.state_dict())
        copy(forward.sublayer.up, layer.mlp.Wi)
        copy(forward.sublayer.down, layer.mlp.Wo)
    ours.norm.load_state_dict(theirs.final_norm.state_dict())
    layout = layout_of()
    valid_BT = valid_of(layout)
    ids_BT = torch.randint(1, 50, valid_BT.shape) * valid_BT
    want = theirs(ids_BT, attention_mask=valid_BT.long(), output_hidden_states=True)
    states = [state_BTD[valid_BT].detach() for state_BTD in want.hidden_states]
    assert_equals(ours, states[:4], want.last_hidden_state[valid_BT].detach(), states[0], layout, Full())


def copy_convolution(ours, pointwise, depthwise, norm, out):
    copy(ours.gate, pointwise)
    ours.depthwise.load_state_dict(depthwise.state_dict())
    ours.norm.load_state_dict(norm.state_dict())
    copy(ours.out, out)


def test_conformer_equals_torchaudios_row_by_row():
    torch.manual_seed(0)
    theirs = Conformer(32, 4, 48, 2, depthwise_conv_kernel_size=7)
    vary(theirs)
    for layer in theirs.conformer_layers:  # running averages of a batch norm that has seen something
        layer.conv_module.sequential[3].running_mean.normal_()
        layer.conv_module.sequential[3].running_var.uniform_(0.5, 2)
    theirs.eval()

    def pre(sublayer):
        return PreNorm(sublayer, 32, eps=1e-5)

    def block(layer):
        half, other = (pre(Scaled(FeedForward(32, 48, F.silu), 0.5)) for _ in range(2))
        attention, convolution = pre(Attention(32, 4)), pre(Convolution(32, 7, bias=True, norm=nn.BatchNorm1d(32)))
        for mine, ffn in ((half, layer.ffn1), (other, layer.ffn2)):
            mine.norm.load_state_dict(ffn.sequential[0].state_dict())
            copy(mine.sublayer.sublayer.up, ffn.sequential[1])
            copy(mine.sublayer.sublayer.down, ffn.sequential[4])
        attention.norm.load_state_dict(layer.self_attn_layer_norm.state_dict())
        with torch.no_grad():
            attention.sublayer.qkv.weight.copy_(layer.self_attn.in_proj_weight)
            attention.sublayer.qkv.bias.copy_(layer.self_attn.in_proj_bias)
        copy(attention.sublayer.out, layer.self_attn.out_proj)
        convolution.norm.load_state_dict(layer.conv_module.layer_norm.state_dict())
        parts = layer.conv_module.sequential
        copy_convolution(convolution.sublayer, parts[0], parts[2], parts[3], parts[5])
        closing = nn.LayerNorm(32)
        closing.load_state_dict(layer.final_layer_norm.state_dict())
        return Block([half, attention, convolution, other, Norm(closing)])

    ours = Encoder([block(layer) for layer in theirs.conformer_layers]).eval()
    layout = layout_of()
    x_ND = torch.randn(layout.size, 32)
    rows = [theirs(row_TD[None], torch.tensor([len(row_TD)]))[0][0] for row_TD in x_ND.split(LENGTHS)]
    assert_equals(ours, [x_ND], torch.cat(rows).detach(), x_ND, layout, Full())


def test_w2v_bert_equals_transformers():
    torch.manual_seed(0)
    config = Wav2Vec2BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        feature_projection_input_dim=16, left_max_position_embeddings=6, right_max_position_embeddings=2,
        conv_depthwise_kernel_size=5, position_embeddings_type="relative_key", add_adapter=False,
        apply_spec_augment=False,
    )  # fmt: skip
    theirs = Wav2Vec2BertModel(config).eval()
    vary(theirs)
    ours = conformer_encoder(32, 2, 4, hidden=48, kernel=5, causal=True, left=6, right=2, eps=config.layer_norm_eps)
    for block, layer in zip(ours.blocks, theirs.encoder.layers, strict=True):
        half, attention, convolution, other, closing = block.sublayers
        pairs = (half, layer.ffn1, layer.ffn1_layer_norm), (other, layer.ffn2, layer.ffn2_layer_norm)
        for mine, ffn, norm in pairs:
            mine.norm.load_state_dict(norm.state_dict())
            copy(mine.sublayer.sublayer.up, ffn.intermediate_dense)
            copy(mine.sublayer.sublayer.down, ffn.output_dense)
        attention.norm.load_state_dict(layer.self_attn_layer_norm.state_dict())
        copy(attention.sublayer.qkv, *(getattr(layer.self_attn, f"linear_{name}") for name in "qkv"))
        copy(attention.sublayer.out, layer.self_attn.linear_out)
        attention.sublayer.bias.table.load_state_dict(layer.self_attn.distance_embedding.state_dict())
        convolution.norm.load_state_dict(layer.conv_module.layer_norm.state_dict())
        parts = layer.conv_module
        copy_convolution(
            convolution.sublayer, parts.pointwise_conv1, parts.depthwise_conv, parts.depthwise_layer_norm,
            parts.pointwise_conv2,
        )  # fmt: skip
        closing.norm.load_state_dict(layer.final_layer_norm.state_dict())
    layout = layout_of()
    valid_BT = valid_of(layout)
    features_BTE = torch.randn(*valid_BT.shape, 16)
    want = theirs(features_BTE, attention_mask=valid_BT.long(), output_hidden_states=True)
    states = [state_BTD[valid_BT].detach() for state_BTD in want.hidden_states]
    assert_equals(ours, states[:2], want.last_hidden_state[valid_BT].detach(), states[0], layout, Full())


def test_lxmerts_cross_layer_equals_transformers():
    """One attention reads across both ways, then each role has an attention and a feed-forward of its own."""
    torch.manual_seed(0)
    config = LxmertConfig(hidden_size=32, num_attention_heads=4, intermediate_size=48, hidden_act="gelu")
    theirs = LxmertXLayer(config).eval()
    vary(theirs)

    def post(sublayer, output):
        made = PostNorm(sublayer, 32, eps=1e-12)
        made.norm.load_state_dict(output.LayerNorm.state_dict())
        return made

    def attention(inner, output, within=None):
        made = Attention(32, 4, within=within)
        copy(made.qkv, inner.query, inner.key, inner.value)
        copy(made.out, output.dense)
        return post(made, output)

    def forward(inter, output):
        made = FeedForward(32, 48)
        copy(made.up, inter.dense)
        copy(made.down, output.dense)
        return post(made, output)

    across = Roles({"text": ("image",), "image": ("text",)})
    cross = theirs.visual_attention
    lang, visn = theirs.lang_self_att, theirs.visn_self_att
    own = {
        "text": Block([attention(lang.self, lang.output), forward(theirs.lang_inter, theirs.lang_output)]),
        "image": Block([attention(visn.self, visn.output), forward(theirs.visn_inter, theirs.visn_output)]),
    }
    ours = Encoder([Block([attention(cross.att, cross.output, across), ByRole(own)])]).eval()
    layout = Layout({"text": torch.tensor([3, 4, 2]), "image": torch.tensor([5, 5, 9])})
    rows = layout.lengths_B.tolist()
    x_ND = torch.randn(sum(rows), 32)
    got = ours(x_ND, layout, Full().plan(layout))
    want = []
    for row_TD, texts in zip(x_ND.split(rows), layout.lengths["text"].tolist(), strict=True):
        text_TD, image_TD = theirs(row_TD[None, :texts], None, row_TD[None, texts:], None)[:2]
        want += [text_TD[0], image_TD[0]]
    assert_close(got, torch.cat(want))
    places = torch.tensor([1, 9, 26])
    assert_close(ours(x_ND, layout, Full().plan(layout), at=places), got[places])


def test_mosaicbert_has_the_published_number_of_weights():
    """137,400,384 in all: 12 layers beside embeddings of 30,528 and 2, their norm, and the head."""
    width = 768
    embeddings = 30_528 * width + 2 * width + 2 * width
    head = width * width + width + 2 * width + 30_528
    with torch.device("meta"):
        encoder = mosaicbert_encoder(width, 12, 12)
    assert sum(weight.numel() for weight in encoder.parameters()) == 137_400_384 - embeddings - head
