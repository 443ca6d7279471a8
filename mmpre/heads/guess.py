"""What a head takes hidden tokens for: to look at, beside the loss that it learns from.

A head that can say so has a method `guess(state_MD, tokens, index_M)`, with the arguments of its `forward`; it returns
a `Choice` or `Restored`. An objective that can make a batch's guesses has `guesses(batch)`, which yields the name of
the pick that each is about, and the guess. Both are found by these names, so an outside one is looked at as well.
"""
# M picked tokens, K best values, E values of a token's clean features

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from mmpre.batch import Batch
from mmpre.tokens import Tokens

BEST = 5


@dataclass(frozen=True)
class Choice:
    """One value out of many, such as an id of a vocabulary: the true one, the likeliest ones, and their probabilities.

    `field` names the field of the tokens that the values are of.
    """

    field: str
    true_M: Int[Tensor, "M"]
    best_MK: Int[Tensor, "M K"]
    share_MK: Float[Tensor, "M K"]

    @staticmethod
    def of(field: str, scores_MV: Float[Tensor, "M V"], true_M: Int[Tensor, "M"]) -> "Choice":
        share_MV = scores_MV.float().softmax(1)
        share_MK, best_MK = share_MV.topk(min(BEST, share_MV.shape[1]), dim=1)
        return Choice(field, true_M, best_MK, share_MK)


@dataclass(frozen=True)
class Restored:
    """Values as a modality's `features` gives them; its `restored(tokens, f_NE)` turns them into tokens to show."""

    value_ME: Float[Tensor, "M E"]


Guess = Choice | Restored


@runtime_checkable
class Guesses(Protocol):
    """A head that can be asked what it takes picked tokens for."""

    def guess(self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]) -> Guess: ...


@runtime_checkable
class Guessing(Protocol):
    """An objective that can be asked for what it predicts of a batch."""

    def guesses(self, batch: Batch) -> Iterable[tuple[str, Guess]]: ...
