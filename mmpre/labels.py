"""Labels of whole rows that a sample's members hold, such as the answer to its question."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mmpre.data.sample import BadMember, Sample
from mmpre.draw import Draw

NONE = -1  # the label of a row that has none


class Label(Protocol):
    """The number of a row's label, in a loading worker; NONE where it has none. Picklable."""

    def __call__(self, sample: Sample, draw: Draw) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Numbered:
    """A member that holds a whole number below `count`, or several with weights, as {"3": 0.7, "12": 0.3}.

    Of several one is drawn, with a chance as its weight says: LXMERT (Tan & Bansal 2019, arXiv:1908.07490) draws one of
    the answers of several people so. A sample without the member has no label; one that holds anything else raises
    BadMember.
    """

    count: int
    suffixes: Sequence[str]

    def __post_init__(self) -> None:
        if self.count < 2:
            raise ValueError(f"Numbered: count must be at least 2, got {self.count}; yes and no are 2")

    def __call__(self, sample: Sample, draw: Draw) -> int:
        if not any(suffix in sample.members for suffix in self.suffixes):
            return NONE
        told, member = sample.json(self.suffixes), sample.bytes(self.suffixes)[0]
        weights = self._weights(told)
        if weights is None:
            detail = f'wanted a whole number from 0 to {self.count - 1}, or weights as {{"3": 0.7}}, got {told!r:.80}'
            raise BadMember("label of another form", member, detail)
        left = draw.uniform("label", *self.suffixes) * sum(weights.values())
        for number, weight in weights.items():
            left -= weight
            if left < 0:
                return number
        return max(weights, key=weights.__getitem__)

    def _weights(self, told: object) -> dict[int, float] | None:
        """How likely each number is, None where `told` does not say."""
        if type(told) is int:
            told = {str(told): 1.0}
        if not isinstance(told, dict) or not all(name.isdecimal() and int(name) < self.count for name in told):
            return None
        if not all(type(weight) in (int, float) and 0 <= weight < math.inf for weight in told.values()):
            return None
        return {int(name): float(weight) for name, weight in told.items()} if sum(told.values()) > 0 else None
