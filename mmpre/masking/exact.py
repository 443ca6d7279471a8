"""A mask that picks an exact share of a row's tokens."""
# N tokens, M picked tokens

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mmpre.draw import Draw
from mmpre.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class ExactShare:
    """Pick a share of a row's ordinary tokens, rounded to a whole number, every choice of that many as likely.

    Works on one row. At least one token is picked, and at least one left where there are two; a row of a single
    ordinary token loses it. MAE (He et al. 2021, arXiv:2111.06377) at a share of 0.75.
    """

    role: str
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"ExactShare: share must lie between 0 and 1, got {self.share}; 75 percent is 0.75")

    def __call__(self, tokens: Tokens, draw: Draw) -> Int[Tensor, "M"]:
        """Return index_M, sorted; empty only where every token is special."""
        free_n = (tokens.special_N < 0).nonzero().squeeze(1)
        most = max(len(free_n) - 1, min(len(free_n), 1))
        count = min(max(1, round(len(free_n) * self.share)), most)
        return free_n[torch.randperm(len(free_n), generator=draw.rng("exact"))[:count]].sort().values
