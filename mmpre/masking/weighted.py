"""A mask that prefers some tokens, by weights that may come from a model."""
# N tokens, M picked tokens, B rows

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmpre.draw import Draw
from mmpre.masking.exact import ordinary_counts, share_of
from mmpre.masking.rows import lowest
from mmpre.masking.schedule import Share, check_share, share_at
from mmpre.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Weighted:
    """Pick an exact share of a row's ordinary tokens without replacement, each draw in proportion to a weight.

    `weights(tokens)` gives one number a token, 0 or more: a callable that is picklable in a worker, or anything in an
    objective, which masks a batch on its device (and may call `draw_weighted` itself, to give counts that it knows).
    Picks fewer where fewer tokens have a weight above 0.
    MergeDNA (Li et al. 2025) weighs a local token that was merged with others into a group of g by 1/g^2; VIOLET (Fu
    et al. 2021, arXiv:2111.12681) by the attention that a token receives.
    """

    role: str
    share: Share
    weights: Callable[[Tokens], Float[Tensor, "N"]]

    def __post_init__(self) -> None:
        check_share("Weighted", "share", self.share)

    def __call__(self, tokens: Tokens, draw: Draw) -> Int[Tensor, "M"]:
        """Return index_M, sorted."""
        weight_N = self.weights(tokens).masked_fill(tokens.special_N >= 0, 0.0)
        counts_B = share_of(ordinary_counts(tokens), share_at("Weighted", "share", self.share, draw.step))
        index_M = draw_weighted(weight_N, tokens.lengths_B, counts_B, draw)
        return index_M[weight_N[index_M] > 0]


def draw_weighted(
    weight_N: Float[Tensor, "N"], lengths_B: Int[Tensor, "B"], counts_B: Int[Tensor, "B"], draw: Draw
) -> Int[Tensor, "M"]:
    """Draw `counts_B` tokens of each row without replacement, sorted, in proportion to their weights.

    Rows have `lengths_B` tokens: those of one role, or of a layout, whose roles are then drawn jointly. Both counts
    lie on the CPU and no device is waited for, so the weights are not looked at: where a row asks for more tokens than
    have a weight above 0, others come along.
    """
    rng = draw.rng("weighted", device=weight_N.device)
    # who comes first in a race of exponential clocks (the Gumbel top-k): equal to drawing one after the other
    clock_N = torch.empty(weight_N.shape, dtype=torch.float64, device=weight_N.device).exponential_(generator=rng)
    return lowest(clock_N / weight_N.detach(), lengths_B, counts_B)
