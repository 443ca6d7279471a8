"""What a recipe's paper says is better than what; `mmpre claim` looks into it (claim.py)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

OWN = "own"  # the arm that is the paper's


@dataclass(frozen=True, kw_only=True)
class Against:
    """Another way: the recipe with `numbers` changed, and the measure by which the paper's own should be better.

    `measure` is a part of the names of results that `mmpre eval` tells, whose mean is taken, or "TASK: METRIC".
    """

    numbers: Mapping[str, Any]
    measure: str
    less: bool = False  # a lower value is better


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says is better than what; a recipe's file calls it `claim`.

    `numbers` hold for all arms, `quick` in place of them for a first look. With `equal` "flops" the steps of other arms
    are such that all take as many FLOPs as the paper's own; with "steps" they are the same.
    """

    says: str
    against: Mapping[str, Against]
    equal: Literal["steps", "flops"] = "steps"
    numbers: Mapping[str, Any] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.against or OWN in self.against:
            raise ValueError(f"Claim: wanted other arms, none called {OWN!r}, got {sorted(self.against)}")
