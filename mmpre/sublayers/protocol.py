"""What a sublayer of an encoder's block is."""
# N tokens of the packed batch, M places asked for, D model width

from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor

from mmpre.attention import Plan
from mmpre.layout import Layout

Places = Int[Tensor, "M"] | None


class Sublayer(Protocol):
    """An nn.Module. `mixes` says whether it needs all tokens of the batch, since they read each other in it or since
    it tells rows or roles apart; other sublayers may be given some tokens alone."""

    mixes: bool

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        """Return states of all tokens, or of those at the places `at`."""
        ...


def narrowed(x_ND: Float[Tensor, "N D"], at: Places) -> Float[Tensor, "_ D"]:
    """The states at the places asked for."""
    # index_select, not x[at]: its backward pass is twice as fast on a CPU
    return x_ND if at is None else x_ND.index_select(0, at)
