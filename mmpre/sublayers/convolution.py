"""The convolution module of Conformer over a packed batch."""
# N tokens of the packed batch, B rows, D model width, c kernel size

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmpre.attention import Plan
from mmpre.layout import Layout
from mmpre.sublayers.protocol import Places, narrowed


class Convolution(nn.Module):
    """A gated linear map, a depthwise convolution along the row, a norm, SiLU and a linear map.

    Rows lie end to end with `kernel` - 1 zeros between them, so none reaches into another, in one call for all.
    `causal` looks back alone. `norm` is nn.LayerNorm(width) unless given; nn.BatchNorm1d(width) is the paper's, and
    makes losses depend on how a batch is split.
    Source: Gulati et al. 2020, arXiv:2005.08100.
    """

    mixes = True

    def __init__(
        self, width: int, kernel: int, *, causal: bool = False, bias: bool = False, norm: nn.Module | None = None
    ) -> None:
        super().__init__()
        if kernel < 1 or (kernel % 2 == 0 and not causal):
            raise ValueError(f"Convolution: kernel must be odd, or causal, to keep a row's length, got {kernel}")
        self.kernel, self.before = kernel, kernel - 1 if causal else kernel // 2
        self.gate = nn.Linear(width, 2 * width, bias=bias)
        self.depthwise = nn.Conv1d(width, width, kernel, groups=width, bias=bias)
        self.norm = nn.LayerNorm(width) if norm is None else norm
        self.out = nn.Linear(width, width, bias=bias)

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        y_ND = narrowed(self.along(F.glu(self.gate(x_ND), dim=1), layout), at)
        return self.out(F.silu(self.norm(y_ND)))

    def along(self, x_ND: Float[Tensor, "N D"], layout: Layout) -> Float[Tensor, "N D"]:
        """The depthwise convolution."""
        if not layout.size:
            return x_ND + 0 * sum(parameter.sum() for parameter in self.depthwise.parameters())
        gap = self.kernel - 1
        spread_N = torch.arange(layout.size, device=x_ND.device) + gap * layout.row_N
        # the zeros after a row are also those before the next one
        x_TD = x_ND.new_zeros(layout.size + gap * len(layout), x_ND.shape[1])
        x_TD = x_TD.index_copy(0, spread_N + self.before, x_ND)
        return self.depthwise(x_TD.T[None])[0].T.index_select(0, spread_N)
