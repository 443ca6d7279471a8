"""Masks that pick tokens independently of what they are."""
# N tokens, M picked tokens

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mmpre.draw import Draw
from mmpre.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class RandomTokens:
    """Pick each of a row's ordinary tokens with the same chance, and at least one of them.

    Works on one row. UNITER (Chen et al. 2019, arXiv:1909.11740) and BERT (arXiv:1810.04805) at a rate of 0.15.
    """

    role: str
    rate: float

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"RandomTokens: rate must lie between 0 and 1, got {self.rate}; 15 percent is 0.15")

    def __call__(self, tokens: Tokens, draw: Draw) -> Int[Tensor, "M"]:
        """Return index_M, sorted; empty only where every token is special."""
        chance_N = torch.rand(len(tokens), generator=draw.rng("random"))
        chance_N = chance_N.masked_fill_(tokens.special_N >= 0, 2.0)
        index_M = (chance_N < self.rate).nonzero().squeeze(1)
        if len(index_M) or not len(tokens):
            return index_M
        lowest = chance_N.argmin(dim=0, keepdim=True)  # every ordinary token is as likely to be it
        return lowest[chance_N[lowest] < 2.0]
