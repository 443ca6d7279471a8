"""A mask that picks an exact share of a row's tokens."""
# N tokens, M picked tokens, B rows

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from mmpre.draw import Draw, Draws
from mmpre.masking.rows import lowest, row_numbers
from mmpre.masking.schedule import Share, check_share, share_at
from mmpre.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class ExactShare:
    """Pick a share of a row's ordinary tokens, rounded to a whole number, every choice of that many as likely.

    At least one token is picked, and at least one left where there are two; a row of a single ordinary token loses
    it. Works on a row or on a batch; on a device it waits once, to learn how many ordinary tokens the rows have.
    MAE (He et al. 2021, arXiv:2111.06377) at a share of 0.75, ELECTRA (Clark et al. 2020, arXiv:2003.10555) at 0.15,
    its large model at 0.25.
    """

    at_once: ClassVar[bool] = True
    role: str
    share: Share

    def __post_init__(self) -> None:
        check_share("ExactShare", "share", self.share)

    def __call__(self, tokens: Tokens, draw: Draw | Draws) -> Int[Tensor, "M"]:
        """Return index_M, sorted. A row has none where every token is special."""
        device = tokens.special_N.device
        share = share_at("ExactShare", "share", self.share, draw.step)
        counts_B = share_of(ordinary_counts(tokens), share)
        chance_N = draw.chances(tokens.lengths_B, "exact", device=device)
        return lowest(chance_N.masked_fill(tokens.special_N >= 0, 2.0), tokens.lengths_B, counts_B)


def ordinary_counts(tokens: Tokens) -> Int[Tensor, "B"]:
    """How many ordinary tokens each row has, on the CPU."""
    free_N = (tokens.special_N < 0).long()
    if len(tokens.lengths_B) == 1:
        return free_N.sum(0, keepdim=True).cpu()
    count_B = free_N.new_zeros(len(tokens.lengths_B))
    return count_B.index_add(0, row_numbers(tokens), free_N).cpu()


def share_of(count_B: Int[Tensor, "B"], share: float) -> Int[Tensor, "B"]:
    """A share of counts, rounded; at least 1 of any, and not all where there are two."""
    most_B = torch.maximum(count_B - 1, count_B.clamp(max=1))
    return torch.minimum((count_B.double() * share).round().long().clamp(min=1), most_B)
