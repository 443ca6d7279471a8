"""The encoder: blocks of sublayers over a packed batch. Variants are composed, not flagged.

A sublayer is a module with `forward(x_ND, layout, plan, at)`; where places `at` are asked for it gives their states
alone. `mixes` says whether tokens read each other in it. Attention and feed-forward are here, the norm wrappers add the
residual path, `bert_encoder` puts them together as BERT does (Devlin et al. 2018, arXiv:1810.04805) and `vit_encoder`
as the vision transformer does.
"""
# N tokens of the packed batch, M places asked for, D model width, H heads, K width of a head

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpre.attention import Plan
from mmpre.attention_backends import attend
from mmpre.dropout import Dropout
from mmpre.tokens import Layout

Places = Int[Tensor, "M"] | None


class Attention(nn.Module):
    """Multi-head self-attention. `dropout` is the share of attention weights set to 0 while training."""

    mixes = True

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"Attention: width must be a multiple of heads, got width {width} and {heads} heads")
        if not 0 <= dropout < 1:
            raise ValueError(f"Attention: dropout must be at least 0 and below 1, got {dropout}; a tenth is 0.1")
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width)  # queries, keys, values
        self.out = nn.Linear(width, width)

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        qkv_N3HK = self.qkv(x_ND).unflatten(1, (3, self.heads, -1))
        y_NHK = attend(*qkv_N3HK.unbind(1), plan, dropout=self.dropout if self.training else 0.0)
        return self.out(_at(y_NHK.flatten(1), at))


class FeedForward(nn.Module):
    """Two linear maps with an activation between them."""

    mixes = False

    def __init__(self, width: int, hidden: int, activation: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.activation = activation

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        return self.down(self.activation(self.up(_at(x_ND, at))))


class PostNorm(nn.Module):
    """norm(x + f(x)), as in BERT and the first transformer. `dropout` acts on f(x)."""

    def __init__(self, sublayer: nn.Module, width: int, dropout: float = 0.0, eps: float = 1e-12) -> None:
        super().__init__()
        self.mixes: bool = sublayer.mixes
        self.sublayer = sublayer
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = Dropout(dropout)

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        y_ND = self.sublayer(x_ND, layout, plan, at)
        return self.norm(self.dropout.add(_at(x_ND, at), y_ND))


class PreNorm(nn.Module):
    """x + f(norm(x)), as in GPT-2 and ViT; the encoder then wants a closing norm. `dropout` acts on f's result."""

    def __init__(self, sublayer: nn.Module, width: int, dropout: float = 0.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.mixes: bool = sublayer.mixes
        self.sublayer = sublayer
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = Dropout(dropout)

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        y_ND = self.sublayer(self.norm(x_ND), layout, plan, at)
        return self.dropout.add(_at(x_ND, at), y_ND)


class Block(nn.Module):
    """Sublayers one after the other: a layer, in the count of `read`."""

    def __init__(self, sublayers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)
        self.mixes = any(sublayer.mixes for sublayer in sublayers)
        self.narrow = _last_mixing(sublayers)

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        for i, sublayer in enumerate(self.sublayers):
            x_ND = sublayer(x_ND, layout, plan, at if i == self.narrow else None)
        return x_ND


@dataclass(frozen=True)
class States:
    """The encoder's result, and the states of all tokens after some of its layers (0: what came in)."""

    last: Float[Tensor, "_ D"]
    layer: Mapping[int, Float[Tensor, "N D"]]


class Encoder(nn.Module):
    """Blocks one after the other, and a closing norm where there is one."""

    def __init__(self, blocks: Sequence[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.narrow = _last_mixing(blocks)

    @overload
    def forward(self, x_ND: Tensor, layout: Layout, plan: Plan, *, at: Places = None, read: None = None) -> Tensor: ...

    @overload
    def forward(
        self, x_ND: Tensor, layout: Layout, plan: Plan, *, at: Places = None, read: Collection[int]
    ) -> States: ...

    def forward(
        self,
        x_ND: Float[Tensor, "N D"],
        layout: Layout,
        plan: Plan,
        *,
        at: Places = None,
        read: Collection[int] | None = None,
    ) -> Float[Tensor, "_ D"] | States:
        """Return the states of all tokens, or of those at the places `at` (M of them).

        What follows the last mixing sublayer's reading is then computed for these alone. With `read`, the states of
        all tokens after those layers are returned too: before the closing norm, layer 0 being what came in.
        """
        read = read if read is None else frozenset(read)
        if read and not read <= set(range(len(self.blocks) + 1)):
            raise ValueError(
                f"Encoder: can read layers 0 (what comes in) to {len(self.blocks)}, asked for {sorted(read)}"
            )
        # A layer that is read needs all its tokens: then the places are picked out after it.
        early = len(self.blocks) > self.narrow >= max(read or (0,))
        layer = {}
        for i, block in enumerate(self.blocks):
            if read and i in read:
                layer[i] = x_ND
            of_layer = plan.of_layer(i, len(self.blocks))
            x_ND = block(x_ND, layout, of_layer, at if early and i == self.narrow else None)
        if read and len(self.blocks) in read:
            layer[len(self.blocks)] = x_ND
        if not early:
            x_ND = _at(x_ND, at)
        if self.norm is not None:
            x_ND = self.norm(x_ND)
        return x_ND if read is None else States(x_ND, layer)


def bert_encoder(
    width: int,
    depth: int,
    heads: int,
    *,
    hidden: int | None = None,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    eps: float = 1e-12,
) -> Encoder:
    """Build BERT's encoder; `hidden`, the feed-forward's inner width, is 4 times `width` unless given.

    Weights are drawn from a normal distribution of deviation 0.02 (not cut off at two deviations as in the authors'
    code, but as in most that came after); biases are 0.
    """

    def post(sublayer: nn.Module) -> PostNorm:
        return PostNorm(sublayer, width, dropout, eps)

    def block() -> Block:
        return Block([post(Attention(width, heads, attention_dropout)), post(FeedForward(width, hidden or 4 * width))])

    encoder = Encoder([block() for _ in range(depth)])
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return encoder


def vit_encoder(
    width: int,
    depth: int,
    heads: int,
    *,
    hidden: int | None = None,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    eps: float = 1e-6,
) -> Encoder:
    """Build ViT's encoder (Dosovitskiy et al. 2020, arXiv:2010.11929): norms before sublayers, and a closing one.

    `hidden`, the feed-forward's inner width, is 4 times `width` unless given. Weights are drawn from Xavier's uniform
    distribution, queries, keys and values as the one matrix they are; biases are 0.
    """

    def pre(sublayer: nn.Module) -> PreNorm:
        return PreNorm(sublayer, width, dropout, eps)

    def block() -> Block:
        return Block([pre(Attention(width, heads, attention_dropout)), pre(FeedForward(width, hidden or 4 * width))])

    encoder = Encoder([block() for _ in range(depth)], nn.LayerNorm(width, eps=eps))
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return encoder


def _at(x_ND: Tensor, at: Places) -> Tensor:
    # index_select, not x[at]: its backward pass is twice as fast on a CPU
    return x_ND if at is None else x_ND.index_select(0, at)


def _last_mixing(sublayers: Sequence[nn.Module]) -> int:
    """After this one only the places asked for are needed."""
    return max((i for i, sublayer in enumerate(sublayers) if sublayer.mixes), default=0)
