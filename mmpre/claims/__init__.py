"""What a recipe's paper says is better than what; `mmpre claim` looks into it (claim.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

OWN = "own"  # the arm that is the paper's


@dataclass(frozen=True)
class Measure:
    """What two ways are compared by: words in the names of results that `mmpre eval` tells, whose mean is taken, or
    "TASK: METRIC".

    With `less` a lower value is better. The paper's own way may be worse by `margin` and still counts as no worse;
    choose it before anything is measured.
    """

    name: str
    less: bool = False
    margin: float = 0.0

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise ValueError(f"Measure: margin must not be negative, got {self.margin}; 0.01 allows so much worse")


@dataclass(frozen=True, kw_only=True)
class Against:
    """Another way: the recipe with `numbers` changed, and by what the paper's own should be better.

    `measure` is a Measure or several, or in place of each its name alone, which `less` then goes with.
    """

    numbers: Mapping[str, Any]
    measure: str | Measure | Sequence[str | Measure]
    less: bool = False  # a lower value is better

    @property
    def measures(self) -> tuple[Measure, ...]:
        some = (self.measure,) if isinstance(self.measure, str | Measure) else self.measure
        return tuple(Measure(one, less=self.less) if isinstance(one, str) else one for one in some)


@dataclass(frozen=True, kw_only=True)
class Before:
    """A run that all arms of a seed start from: of another recipe, whose folder becomes one of the claim's numbers.

    `shared` names the claim's own numbers that it is given as well, beside `data`, `valid` and `tokenizer`.
    """

    number: str  # of the claim's recipe, such as "start"
    recipe: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)  # in place of them for a first look
    scale: str = "tiny"
    shared: Sequence[str] = ("data", "valid", "tokenizer")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a paper says is better than what; a recipe's file calls it `claim`.

    `numbers` hold for all arms, `quick` in place of them for a first look. With `equal` "flops" the steps of other arms
    are such that all take as many FLOPs as the paper's own, but for those with `steps` of their own; with "steps" they
    are the same. Beside the recipe's own evaluations the tasks of data sets' cards are measured, those of the `kinds`.
    """

    says: str
    against: Mapping[str, Against]
    equal: Literal["steps", "flops"] = "steps"
    numbers: Mapping[str, Any] = field(default_factory=dict)
    quick: Mapping[str, Any] = field(default_factory=dict)
    before: Before | None = None
    kinds: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.against or OWN in self.against:
            raise ValueError(f"Claim: wanted other arms, none called {OWN!r}, got {sorted(self.against)}")
