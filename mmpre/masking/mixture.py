"""A mask that is one of several."""
# M picked tokens

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mmpre.draw import Draw
from mmpre.masking.protocol import Mask
from mmpre.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Pick by one of several masks, drawn for each row by shares that sum to 1; None picks nothing.

    Mixtures with the same shares and the same `coin` choose alike for all picks of a row, whatever their role. Works
    on what all of its masks work on; a batch is one draw.
    VIOLET (Fu et al. 2021, arXiv:2111.12681) hides half of the rows blockwise, text and video, and leaves the other
    half to the model's attention.
    """

    role: str
    parts: Sequence[tuple[float, Mask | None]]
    coin: str = "mixture"

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.parts]
        if not shares or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"Mixture: shares must not be negative and sum to 1, got {shares}")
        if others := sorted({mask.role for _, mask in self.parts if mask is not None} - {self.role}):
            raise ValueError(f"Mixture: every mask must have the role {self.role!r}, got {', '.join(others)}")

    def __call__(self, tokens: Tokens, draw: Draw) -> Int[Tensor, "M"]:
        """Return index_M, sorted."""
        number, left = 0, draw.whole().uniform("mixture", self.coin)
        while number < len(self.parts) - 1 and left >= self.parts[number][0]:
            left -= self.parts[number][0]
            number += 1
        mask = self.parts[number][1]
        if mask is None:
            return torch.empty(0, dtype=torch.int64, device=tokens.special_N.device)
        return mask(tokens, draw.child("part", number))
