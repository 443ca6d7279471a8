"""An Attend for one batch, token by token: the one definition that all backends follow."""

import math
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Bool, Int
from torch import Tensor


class Rule(Protocol):
    """Whether the token at place q of the packed batch may attend to the one at place k of the same row.

    The places are tensors of one shape, or of shapes that broadcast. A rule is a frozen dataclass: its tensors move
    with the plan.
    """

    def __call__(self, q: Int[Tensor, "..."], k: Int[Tensor, "..."]) -> Bool[Tensor, "..."]: ...


@dataclass(frozen=True)
class Band:
    """Keys from `left` places before a token to `right` places after it; the kernels know these rules by name."""

    left: float = math.inf
    right: float = math.inf

    def __call__(self, q: Int[Tensor, "..."], k: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return (k - q >= -self.left) & (k - q <= self.right)


EVERYONE = Band()
CAUSAL = Band(right=0)


@dataclass(frozen=True)
class Both:
    """What two rules allow."""

    one: Rule
    other: Rule

    @staticmethod
    def of(one: Rule, other: Rule) -> Rule:
        if isinstance(one, Band) and isinstance(other, Band):
            return Band(min(one.left, other.left), min(one.right, other.right))
        return one if other == EVERYONE else other if one == EVERYONE else Both(one, other)

    def __call__(self, q: Int[Tensor, "..."], k: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return self.one(q, k) & self.other(q, k)


@dataclass(frozen=True)
class Subset:
    """A rule for some of the tokens: the i-th of them stands at `place_n[i]` of the rule's own batch."""

    rule: Rule
    place_n: Int[Tensor, "n"]

    def __call__(self, q: Int[Tensor, "..."], k: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
        return self.rule(self.place_n[q], self.place_n[k])
