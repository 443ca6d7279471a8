"""What a mask and a corruption are."""
# N tokens, n seen ones, M picked tokens, B rows

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmpre.data.sample import Sample
from mmpre.draw import Draw
from mmpre.tokens import Tokens


class Mask(Protocol):
    """Picks tokens of one role, of a row in a worker; where its docstring says so, of a batch on a device as well.

    A batch of one row is picked like the row, by the same draw. A mask or a corruption that has an attribute `at_once`
    which is True gets all rows of a micro-batch together, with their `Draws`, if the rest of its view can do so too:
    what it makes of each row must be the same, and what it picks sorted.
    """

    role: str

    def __call__(self, tokens: Tokens, draw: Draw) -> Int[Tensor, "M"]:
        """Return the numbers of the picked tokens, sorted, none special (pairs.py: ends of pairs)."""
        ...


@runtime_checkable
class SampleMask(Protocol):
    """A mask that depends on which sample it is; a view asks it for the mask of each."""

    role: str

    def of(self, sample: Sample) -> Mask: ...


@dataclass(frozen=True)
class Corrupted:
    """What is left for the encoder to see after a corruption.

    `replaced_N` marks seen tokens that stand for a hidden one (a picked token may also be kept as it is).
    `index_map` gives, for every clean token, its number among the seen ones, -1 where it was dropped; None means
    that nothing moved. `also` names further places that the corruption made, each as numbers of clean tokens and of
    seen ones; a view makes them picks called "PICK.NAME".
    """

    tokens: Tokens
    replaced_N: Bool[Tensor, "n"]
    index_map: Int[Tensor, "N"] | None = None
    also: Mapping[str, tuple[Int[Tensor, "m"], Int[Tensor, "m"]]] = field(default_factory=dict)


class Corruption(Protocol):
    """Hides picked tokens; the same call serves a row in a worker and a batch on the device."""

    def __call__(self, tokens: Tokens, index_M: Int[Tensor, "M"], draw: Draw) -> Corrupted: ...


@runtime_checkable
class Borrower(Protocol):
    """A corruption that shows something of another sample; a view lends it the other's tokens, of the same role."""

    def borrowing(self, other: Callable[[], Tokens]) -> Corruption: ...


def untouched(tokens: Tokens) -> Corrupted:
    """Tokens as they are, nothing replaced."""
    return Corrupted(tokens, torch.zeros(len(tokens), dtype=torch.bool, device=tokens.special_N.device))
