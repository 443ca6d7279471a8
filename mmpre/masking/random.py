"""Masks that pick tokens independently of what they are."""
# N tokens, M picked tokens, B rows

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from mmpre.draw import Draw, Draws
from mmpre.masking.rows import row_numbers
from mmpre.masking.schedule import Share, check_share, share_at
from mmpre.masking.units import first_of_unit
from mmpre.tokens import Tokens

NEVER = 2.0  # above every chance


@dataclass(frozen=True, kw_only=True)
class RandomTokens:
    """Pick each ordinary token with the same chance, and at least one in each row, unless `at_least_one` is False.

    With `unit`, a field that numbers what belongs together (see units.py), whole units are picked, each with the same
    chance. Works on a row or on a batch; a device is waited for, to learn how many are picked.

    BERT (arXiv:1810.04805) and UNITER (Chen et al. 2019, arXiv:1909.11740) at a rate of 0.15; LXMERT (Tan & Bansal
    2019, arXiv:1908.07490) where no token at all may be picked; ERNIE-Gram (Xiao et al. 2020, arXiv:2010.12148) picks
    0.15 of its n-grams.
    """

    at_once: ClassVar[bool] = True
    role: str
    rate: Share
    unit: str | None = None
    at_least_one: bool = True

    def __post_init__(self) -> None:
        check_share("RandomTokens", "rate", self.rate)

    def __call__(self, tokens: Tokens, draw: Draw | Draws) -> Int[Tensor, "M"]:
        """Return index_M, sorted. A row has none where every token is special."""
        device = tokens.special_N.device
        chance_N = draw.chances(tokens.lengths_B, "random", device=device)
        if self.unit is not None:
            chance_N = chance_N[first_of_unit(tokens, self.unit)]
        free_N = tokens.special_N < 0
        picked_N = (chance_N < share_at("RandomTokens", "rate", self.rate, draw.step)) & free_N
        if not self.at_least_one or len(tokens.lengths_B) == 1:
            index_M = picked_N.nonzero().squeeze(1)
            if not self.at_least_one or len(index_M):
                return index_M
        # the lowest is picked anyway where any is; every token is as likely to be it
        row_N, chance_N = row_numbers(tokens), chance_N.masked_fill(~free_N, NEVER)
        lowest_B = chance_N.new_full((len(tokens.lengths_B),), NEVER).scatter_reduce(0, row_N, chance_N, "amin")
        return (picked_N | ((chance_N == lowest_B[row_N]) & free_N)).nonzero().squeeze(1)
