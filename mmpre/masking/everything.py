"""A mask that picks all there is."""
# N tokens, M picked tokens

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from torch import Tensor

from mmpre.draw import Draw, Draws
from mmpre.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Everything:
    """Pick every ordinary token: for losses over all tokens, such as those of an autoencoder that hides none."""

    at_once: ClassVar[bool] = True
    role: str

    def __call__(self, tokens: Tokens, draw: Draw | Draws) -> Int[Tensor, "M"]:
        """Return index_M, sorted."""
        return (tokens.special_N < 0).nonzero().squeeze(1)
