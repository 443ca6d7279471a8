"""Encoders that papers name, put together from sublayers, each with the weights that its authors start from.

What none of them has is composed in the same way, in a recipe: Encoder([Block([PostNorm(Attention(...), ...), ...])]).
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from mmpre.attention import Window
from mmpre.attention.bias import ALiBi, LogBuckets, RelativeKey, Rotary
from mmpre.attention.by_tokens import Roles
from mmpre.blocks import Averaged, Block, Encoder
from mmpre.merging_encoder import MergingEncoder
from mmpre.sublayers.attention import Attention, GatedAttention
from mmpre.sublayers.by_role import ByRole
from mmpre.sublayers.convolution import Convolution
from mmpre.sublayers.feed_forward import FeedForward, GatedFeedForward
from mmpre.sublayers.residual import DropPath, LayerScale, Norm, PostNorm, PreNorm, Scaled

Module = TypeVar("Module", bound=nn.Module)


def bert_encoder(
    width: int,
    depth: int,
    heads: int,
    *,
    hidden: int | None = None,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    head_dropout: float = 0.0,
    eps: float = 1e-12,
) -> Encoder:
    """Build BERT's encoder; `hidden`, the feed-forward's inner width, is 4 times `width` unless given.

    Weights are drawn from a normal distribution of deviation 0.02 (not cut off at two deviations as in the authors'
    code, but as in most that came after); biases are 0.
    """

    def post(sublayer: nn.Module) -> PostNorm:
        return PostNorm(sublayer, width, dropout, eps)

    def block() -> Block:
        attention = Attention(width, heads, attention_dropout, head_dropout=head_dropout)
        return Block([post(attention), post(FeedForward(width, hidden or 4 * width))])

    return _normal(Encoder([block() for _ in range(depth)]))


def mosaicbert_encoder(
    width: int,
    depth: int,
    heads: int,
    *,
    hidden: int | None = None,
    dropout: float = 0.1,
    alibi: bool = True,
    gated: bool = True,
    eps: float = 1e-12,
) -> Encoder:
    """Build MosaicBERT's encoder (Portes et al. 2023, arXiv:2312.17482): BERT's with ALiBi and a GeGLU.

    It wants no positions added to its input. `dropout` acts after attention and inside the feed-forward, as in the
    authors' code; attention has none. `hidden` and the start weights are as in `bert_encoder`. The paper's ablations
    take `alibi` or `gated` away, which leaves what BERT has in that place.
    """
    bias = ALiBi(heads) if alibi else None

    def block() -> Block:
        attention = PostNorm(Attention(width, heads, bias=bias), width, dropout, eps)
        inner = hidden or 4 * width
        if not gated:
            return Block([attention, PostNorm(FeedForward(width, inner), width, dropout, eps)])
        return Block(
            [attention, PostNorm(GatedFeedForward(width, inner, dropout=dropout, down_bias=True), width, eps=eps)]
        )

    return _normal(Encoder([block() for _ in range(depth)]))


def vit_encoder(
    width: int,
    depth: int,
    heads: int,
    *,
    hidden: int | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    drop_path: float = 0.0,
    layer_scale: float | None = None,
    eps: float = 1e-6,
) -> Encoder:
    """Build ViT's encoder (Dosovitskiy et al. 2020, arXiv:2010.11929): norms before sublayers, and a closing one.

    `hidden`, the feed-forward's inner width, is 4 times `width` unless given. As in later ViTs, a share of the rows
    leaves sublayers out while training, from 0 in the first layer to `drop_path` in the last, and sublayers are
    scaled by learned vectors that start at `layer_scale`. Weights are drawn from Xavier's uniform distribution,
    queries, keys and values as the one matrix they are; biases are 0.
    """

    def pre(sublayer: nn.Module, i: int) -> PreNorm:
        if layer_scale is not None:
            sublayer = LayerScale(sublayer, width, layer_scale)
        if drop_path:
            sublayer = DropPath(sublayer, drop_path * i / max(1, depth - 1))
        return PreNorm(sublayer, width, dropout, eps)

    def block(i: int) -> Block:
        attention = Attention(width, heads, attention_dropout)
        return Block([pre(attention, i), pre(FeedForward(width, hidden or 4 * width), i)])

    encoder = Encoder([block(i) for i in range(depth)], nn.LayerNorm(width, eps=eps))
    return _started(encoder, nn.init.xavier_uniform_)


def llama_encoder(
    width: int,
    depth: int,
    heads: int,
    *,
    kv_heads: int | None = None,
    hidden: int | None = None,
    theta: float = 10_000.0,
    eps: float = 1e-6,
) -> Encoder:
    """Build Llama's layers (Touvron et al. 2023, arXiv:2302.13971): RMSNorm, rotary attention, SwiGLU, no biases.

    Whether it looks to the right is the view's attend: `Causal` as Llama itself, or `Full`. `hidden` is 8/3 of `width`
    unless given, `kv_heads` as many as `heads`. Weights are drawn from a normal distribution of deviation 0.02.
    """
    blocks = [_llama_block(width, heads, kv_heads, hidden, theta, eps) for _ in range(depth)]
    return _normal(Encoder(blocks, nn.RMSNorm(width, eps=eps)))


def merging_encoder(
    width: int,
    depths: tuple[int, int, int, int],
    heads: int,
    *,
    hidden: int | None = None,
    window: int = 16,
    group: int = 64,
    share: float = 0.5,
    temperature: float = 0.1,
    theta: float = 10_000.0,
    eps: float = 1e-6,
) -> MergingEncoder:
    """Build MergeDNA's four parts (Li et al. 2025, arXiv:2511.14806) of Llama's layers; `depths` are theirs.

    In order: the local encoder, which merges neighbours within `window` tokens; the latent encoder; the latent decoder;
    the local decoder. What the others mean says `MergingEncoder`; `hidden` and the start weights are `llama_encoder`'s.
    """
    parts = [[_llama_block(width, heads, None, hidden, theta, eps) for _ in range(depth)] for depth in depths]
    norm = nn.RMSNorm(width, eps=eps)
    encoder = MergingEncoder(
        *parts, norm, width=width, window=window, group=group, share=share, temperature=temperature
    )
    return _started(encoder, lambda weight: nn.init.normal_(weight, std=0.02))


def modernbert_encoder(
    width: int,
    depth: int,
    heads: int,
    *,
    hidden: int | None = None,
    every: int = 3,
    reach: int = 64,
    theta: float = 160_000.0,
    local_theta: float = 10_000.0,
    attention_dropout: float = 0.0,
    out_dropout: float = 0.0,
    dropout: float = 0.0,
    eps: float = 1e-5,
) -> Encoder:
    """Build ModernBERT's encoder (Warner et al. 2024, arXiv:2412.13663): GeGLU, rotary attention, no biases.

    The first layer and each `every`-th one after it see the whole row, with rotary embeddings of `theta`; the others
    see `reach` tokens to each side, with `local_theta`. The input is normed already, so the first attention has no
    norm. `hidden` is 3/2 of `width` unless given. `out_dropout` acts on what attention gives, `dropout` inside the
    feed-forward. Weights are drawn from a normal distribution of deviation 0.02, cut
    off at two deviations, maps back to the states with that over the root of twice the depth.
    """

    def norm() -> nn.Module:
        return nn.LayerNorm(width, eps=eps, bias=False)

    near = Window(reach)  # one for all: what a batch's plan makes of an attend is made once for each

    def block(i: int) -> Block:
        everywhere = i % every == 0
        attention = Attention(
            width, heads, attention_dropout, linear_bias=False, within=None if everywhere else near,
            rotary=Rotary(width // heads, theta if everywhere else local_theta),
        )  # fmt: skip
        gated = GatedFeedForward(width, hidden or 3 * width // 2, dropout=dropout)
        return Block(
            [
                PreNorm(attention, width, out_dropout, norm=norm() if i else nn.Identity()),
                PreNorm(gated, width, norm=norm()),
            ]
        )

    encoder = Encoder([block(i) for i in range(depth)], norm())
    _started(encoder, lambda weight: nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04))
    std = 0.02 / math.sqrt(2 * depth)
    for name, module in encoder.named_modules():
        if name.endswith((".out", ".down")):
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    return encoder


def conformer_encoder(
    width: int,
    depth: int,
    heads: int,
    *,
    hidden: int | None = None,
    kernel: int = 31,
    causal: bool = False,
    left: int = 64,
    right: int = 8,
    dropout: float = 0.1,
    eps: float = 1e-5,
) -> Encoder:
    """Build Conformer's encoder (Gulati et al. 2020, arXiv:2005.08100) as w2v-BERT 2.0 has it (arXiv:2312.05187).

    Attention and convolution stand between two half steps of feed-forward. Positions are relative keys, `left` before
    and `right` after a token at most; convolutions have `kernel` places, back alone if `causal`, and a LayerNorm where
    the first paper has a batch norm. `hidden` is 4 times `width` unless given. Weights of linear maps are drawn from a
    normal distribution of deviation 0.02, biases are 0.
    """

    def pre(sublayer: nn.Module) -> PreNorm:
        return PreNorm(sublayer, width, dropout, eps)

    def half() -> PreNorm:
        return pre(Scaled(FeedForward(width, hidden or 4 * width, F.silu, dropout=dropout), 0.5))

    def block() -> Block:
        attention = Attention(width, heads, dropout, bias=RelativeKey(width // heads, left=left, right=right))
        convolution = Convolution(width, kernel, causal=causal, norm=nn.LayerNorm(width, eps=eps))
        return Block([half(), pre(attention), pre(convolution), half(), Norm(nn.LayerNorm(width, eps=eps))])

    return _normal(Encoder([block() for _ in range(depth)]))


def ltgbert_encoder(
    width: int,
    depth: int,
    heads: int,
    *,
    hidden: int | None = None,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    eps: float = 1e-5,
) -> Encoder:
    """Build LTG-BERT's layers (Samuel et al. 2023, arXiv:2303.09859) as GPT-BERT has them (arXiv:2410.24159).

    Norms without weights before sublayers and within them, gated attention with disentangled distances, GeGLU, and an
    average of all states after each sublayer. It wants no positions added to its input, and has no closing norm.
    `hidden` is 10/3 of `width` unless given. Weights are drawn from a normal distribution of deviation
    sqrt(2 / (5 width)), cut off at two deviations; those of the i-th feed-forward times sqrt(1 / (2 i)); biases are 0.
    """
    distances = LogBuckets(width, eps=eps)
    std = math.sqrt(2 / (5 * width))

    def norm(size: int) -> nn.Module:
        return nn.LayerNorm(size, eps=eps, elementwise_affine=False)

    def pair(i: int) -> list[PreNorm]:
        inner = hidden or 10 * width // 3
        attention = GatedAttention(width, heads, distances, attention_dropout, eps=eps)
        gated = GatedFeedForward(width, inner, partial(F.gelu, approximate="tanh"), norm=norm(inner))
        for linear in (attention.qk, attention.vg, attention.out, gated.up, gated.down):
            nn.init.trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        with torch.no_grad():
            for linear in (gated.up, gated.down):
                linear.weight.mul_(math.sqrt(1 / (2 * (1 + i))))
        return [
            PreNorm(attention, width, attention_dropout, norm=norm(width)),
            PreNorm(gated, width, dropout, norm=norm(width)),
        ]

    nn.init.trunc_normal_(distances.table.weight, std=std, a=-2 * std, b=2 * std)
    return Encoder([Averaged([sublayer for i in range(depth) for sublayer in pair(i)])])


def two_stream_encoder(
    width: int,
    heads: int,
    *,
    own: Mapping[str, int],
    across: int,
    hidden: int | None = None,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    eps: float = 1e-12,
) -> Encoder:
    """Build an encoder whose two roles first have layers of their own, as many as `own` says, and then `across` shared.

    In those, one attention, the same for both, lets the tokens of each role read the other's, both at once; then each
    role has an attention and a feed-forward of its own. All are post-norm, as BERT's, with its start weights; `hidden`
    is 4 times `width` unless given. The longer of the first stacks goes on alone; layers are counted over both.
    Source: LXMERT, Tan & Bansal 2019, arXiv:1908.07490.
    """
    if len(own) != 2 or min(own.values()) < 0 or across < 0 or not max(own.values()) + across:
        raise ValueError(
            "two_stream_encoder: wanted two roles with 0 or more layers each, across of 0 or more, and a layer in all, "
            f"got own {dict(own)} and across {across}"
        )

    def post(sublayer: nn.Module) -> PostNorm:
        return PostNorm(sublayer, width, dropout, eps)

    def layer() -> Block:
        attention = Attention(width, heads, attention_dropout)
        return Block([post(attention), post(FeedForward(width, hidden or 4 * width))])

    one, other = own
    reads = Roles({one: (other,), other: (one,)})
    blocks: list[nn.Module] = [
        ByRole({role: layer() for role, depth in own.items() if i < depth}) for i in range(max(own.values()))
    ]
    for _ in range(across):
        crossing = Attention(width, heads, attention_dropout, within=reads)
        blocks.append(Block([post(crossing), ByRole({role: layer() for role in own})]))
    return _normal(Encoder(blocks))


def _llama_block(width: int, heads: int, kv_heads: int | None, hidden: int | None, theta: float, eps: float) -> Block:
    def pre(sublayer: nn.Module) -> PreNorm:
        return PreNorm(sublayer, width, norm=nn.RMSNorm(width, eps=eps))

    rotary = Rotary(width // heads, theta)
    attention = Attention(width, heads, rotary=rotary, kv_heads=kv_heads, linear_bias=False)
    return Block([pre(attention), pre(GatedFeedForward(width, hidden or 8 * width // 3, F.silu))])


def _normal(encoder: Encoder) -> Encoder:
    return _started(encoder, lambda weight: nn.init.normal_(weight, std=0.02))


def _started(encoder: Module, draw: Callable) -> Module:
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            draw(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return encoder
