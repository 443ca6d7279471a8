"""Feed-forward sublayers: each token by itself."""
# N tokens of the packed batch, D model width, E inner width

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmpre.attention import Plan
from mmpre.dropout import Dropout
from mmpre.layout import Layout
from mmpre.sublayers.protocol import Places, narrowed

Activation = Callable[[Tensor], Tensor]


class FeedForward(nn.Module):
    """Two linear maps with an activation between them; `dropout` acts between them too."""

    mixes = False

    def __init__(self, width: int, hidden: int, activation: Activation = F.gelu, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        self.activation = activation
        self.dropout = Dropout(dropout)

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        return self.down(self.dropout(self.activation(self.up(narrowed(x_ND, at)))))


class GatedFeedForward(nn.Module):
    """down(activation(a) * b), where a and b are the halves of one linear map: GeGLU, or SwiGLU with F.silu.

    `dropout` acts before the map down, and `norm` before it, where there is one. `up_bias` and `down_bias` say whether
    the maps have biases.
    Source: Shazeer 2020, arXiv:2002.05202.
    """

    mixes = False

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Activation = F.gelu,
        *,
        dropout: float = 0.0,
        up_bias: bool = False,
        down_bias: bool = False,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=up_bias)
        self.down = nn.Linear(hidden, width, bias=down_bias)
        self.activation = activation
        self.norm = norm
        self.dropout = Dropout(dropout)

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        gate_NE, value_NE = self.up(narrowed(x_ND, at)).chunk(2, dim=1)
        x_NE = self.activation(gate_NE) * value_NE
        return self.down(self.dropout(x_NE if self.norm is None else self.norm(x_NE)))
