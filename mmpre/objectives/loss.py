"""What an objective returns, and what the training loop makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """One part of a loss: a sum over this micro-batch, and what it is divided by.

    `per` names a count that the loading workers took ("picked:NAME", "tokens" or "rows"). Counts are summed over the
    micro-batches and processes of a step before the backward pass, so a split of the batch changes no gradient.
    """

    name: str
    sum: Float[Tensor, ""]
    per: str
    weight: float = 1.0


@dataclass(frozen=True)
class Loss:
    """Terms of one forward pass, and sums worth logging that carry no gradient (as name -> (sum, per))."""

    terms: Sequence[Term]
    metrics: Mapping[str, tuple[Tensor, str]] = field(default_factory=dict)

    def total(self, counts: Mapping[str, int]) -> Float[Tensor, ""]:
        """Weigh and add the terms, each divided by its count over the whole step; a count of zero gives zero."""
        parts = [term.weight / counts[term.per] * term.sum for term in self.terms if counts[term.per] > 0]
        return torch.stack(parts).sum() if parts else sum(term.sum * 0.0 for term in self.terms)

    def detached(self) -> "Loss":
        """The same numbers without the graph that made them."""
        return Loss(
            [replace(term, sum=term.sum.detach()) for term in self.terms],
            {name: (value.detach(), per) for name, (value, per) in self.metrics.items()},
        )
