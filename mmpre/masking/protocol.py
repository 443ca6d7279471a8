"""What a mask and a corruption are."""
# N tokens, M picked tokens

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmpre.draw import Draw
from mmpre.tokens import Tokens


class Mask(Protocol):
    """Picks tokens of one role."""

    role: str

    def __call__(self, tokens: Tokens, draw: Draw) -> Int[Tensor, "M"]:
        """Return the numbers of the picked tokens, sorted, none special."""
        ...


@dataclass(frozen=True)
class Corrupted:
    """What is left for the encoder to see after a corruption.

    `replaced_N` marks seen tokens that stand for a hidden one (a picked token may also be kept as it is).
    `index_map` gives, for every clean token, its number among the seen ones, -1 where it was dropped; None means
    that nothing moved.
    """

    tokens: Tokens
    replaced_N: Bool[Tensor, "N"]
    index_map: Int[Tensor, "n"] | None = None


class Corruption(Protocol):
    """Hides picked tokens; the same call serves a row in a worker and a batch on the device."""

    def __call__(self, tokens: Tokens, index_M: Int[Tensor, "M"], draw: Draw) -> Corrupted: ...


def untouched(tokens: Tokens) -> Corrupted:
    """Tokens as they are, nothing replaced."""
    return Corrupted(tokens, torch.zeros(len(tokens), dtype=torch.bool, device=tokens.special_N.device))
