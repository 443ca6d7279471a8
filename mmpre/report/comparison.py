"""Two ways beside each other over seeds: each seed's values, means, the difference with its interval, as one SVG."""
# S seeds

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mmpre.report.chart import Axis, number
from mmpre.report.template import template

WIDTH, TALL, HEAD, LINE = 720, 108, 12, 16  # of the drawing; of a comparison below its title; above; of a title's line
LEFT, MIDDLE, GAP, RIGHT = 150, 430, 40, 14  # where the values begin and end; between the plots; after the second
LETTERS = 96  # of a title's line
TOP, ROW = 24, 26  # from the title to the plots; between their rows


@dataclass(frozen=True)
class Comparison:
    """One measure of two ways, named `names`. `low` to `high` is the interval of `better`, the mean difference."""

    title: str
    names: tuple[str, str]
    values: tuple[Sequence[float], Sequence[float]]
    better: float
    low: float
    high: float
    margin: float
    verdict: str

    @cached_property
    def lines(self) -> list[str]:
        return textwrap.wrap(self.title, LETTERS)

    @property
    def height(self) -> int:
        return TALL + LINE * len(self.lines)

    @cached_property
    def value(self) -> Axis:
        return _around([one for some in self.values for one in some], LEFT, MIDDLE)

    @cached_property
    def difference(self) -> Axis:
        return _around([self.low, self.high, 0.0, -self.margin], MIDDLE + GAP, WIDTH - RIGHT)

    @cached_property
    def means(self) -> list[float]:
        return [sum(some) / len(some) for some in self.values]

    @property
    def good(self) -> str:
        return {"reproduced": "good", "not reproduced": "bad"}.get(self.verdict, "")


def picture(comparisons: Sequence[Comparison]) -> str:
    """The comparisons below each other, as the text of an SVG that needs nothing else."""
    tops, height = [], HEAD
    for one in comparisons:
        tops.append(height)
        height += one.height
    return template("comparison.svg").render(
        placed=list(zip(tops, comparisons, strict=True)), width=WIDTH, height=height, left=LEFT, line=LINE, top=TOP,
        row=ROW, number=number,
    )  # fmt: skip


def _around(values: Sequence[float], start: float, end: float) -> Axis:
    low, high = min(values), max(values)
    margin = (high - low or abs(high) or 1.0) * 0.08
    return Axis(low - margin, high + margin, start, end)
