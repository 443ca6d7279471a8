"""Wrappers of sublayers: the residual path with its norm, and what scales or drops a sublayer's result."""
# N tokens of the packed batch, M places asked for, B rows, D model width

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmpre.attention import Plan
from mmpre.dropout import Dropout, keep_like
from mmpre.layout import Layout
from mmpre.sublayers.protocol import Places, Sublayer, narrowed


class _Residual(nn.Module):
    """The norm is LayerNorm, unless another one is given, such as nn.RMSNorm(width). `dropout` acts on f's result."""

    eps: float  # of the norm, by default

    def __init__(
        self, sublayer: Sublayer, width: int, dropout: float = 0.0, eps: float | None = None,
        *, norm: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.mixes: bool = sublayer.mixes
        self.sublayer = sublayer
        self.norm = nn.LayerNorm(width, eps=self.eps if eps is None else eps) if norm is None else norm
        self.dropout = Dropout(dropout)


class PostNorm(_Residual):
    """norm(x + f(x)), as in BERT and the first transformer."""

    eps = 1e-12

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        y_ND = self.sublayer(x_ND, layout, plan, at)
        return self.norm(self.dropout.add(narrowed(x_ND, at), y_ND))


class PreNorm(_Residual):
    """x + f(norm(x)), as in GPT-2 and ViT; the encoder then wants a closing norm."""

    eps = 1e-6

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        y_ND = self.sublayer(self.norm(x_ND), layout, plan, at)
        return self.dropout.add(narrowed(x_ND, at), y_ND)


class Norm(nn.Module):
    """A norm as a sublayer of its own, such as the one that closes a Conformer block."""

    mixes = False

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        return self.norm(narrowed(x_ND, at))


class Scaled(nn.Module):
    """A sublayer's result times a number, such as Conformer's half-step feed-forward: Scaled(FeedForward(...), 0.5)."""

    def __init__(self, sublayer: Sublayer, factor: float) -> None:
        super().__init__()
        self.mixes: bool = sublayer.mixes
        self.sublayer, self.factor = sublayer, factor

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        return self.factor * self.sublayer(x_ND, layout, plan, at)


class LayerScale(nn.Module):
    """A sublayer's result times a learned vector, `start` at first (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, sublayer: Sublayer, width: int, start: float) -> None:
        super().__init__()
        self.mixes: bool = sublayer.mixes
        self.sublayer = sublayer
        self.factor_D = nn.Parameter(torch.full((width,), start))

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        return self.factor_D * self.sublayer(x_ND, layout, plan, at)


class DropPath(nn.Module):
    """While training, leave a sublayer out for a share p of the rows and scale it up for the others.

    Source: stochastic depth, Huang et al. 2016, arXiv:1603.09382, per row as ViTs have it.
    """

    mixes = True  # which row a token is of must be known

    def __init__(self, sublayer: Sublayer, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"DropPath: p must be at least 0 and below 1, got {p}; a tenth is 0.1, none is 0")
        self.sublayer, self.p = sublayer, p

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        y_MD = self.sublayer(x_ND, layout, plan, at)
        if not self.p or not self.training:
            return y_MD
        keep_B, up = keep_like(y_MD.new_empty(len(layout)), self.p)
        row_M = layout.row_N if at is None else layout.row_N.index_select(0, at)
        return y_MD * (keep_B * up).index_select(0, row_M)[:, None]
