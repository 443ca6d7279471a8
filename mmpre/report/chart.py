"""Line charts as numbers that a template turns into SVG: scales, ticks, paths, and the points that a pointer shows."""
# n points of a series

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Float

WIDTH, HEIGHT = 360, 200  # of the drawing, in its own units
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 22  # of them around the plot
BUCKETS = 120  # a line of more points is drawn as means over so many parts of its length
COLOURS = 8  # that the page has


@dataclass(frozen=True)
class Series:
    """Values over steps. `dots` are few and drawn one by one (held-out losses); others become a line."""

    name: str
    x_n: Float[np.ndarray, "n"]
    y_n: Float[np.ndarray, "n"]
    colour: int = 0
    dots: bool = False

    @cached_property
    def drawn(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """x, mean, lowest and highest of each bucket; every point by itself where they are few."""
        if self.dots or len(self.x_n) <= BUCKETS:
            return self.x_n, self.y_n, self.y_n, self.y_n
        parts = [np.array_split(values, BUCKETS) for values in (self.x_n, self.y_n)]
        x = np.array([part[-1] for part in parts[0]])
        return x, *(np.array([f(part) for part in parts[1]]) for f in (np.mean, np.min, np.max))


@dataclass(frozen=True)
class Mark:
    """A step at which something happened: a restart, a skipped step, the next stage, the best checkpoint."""

    x: float
    kind: str
    text: str


@dataclass(frozen=True)
class Axis:
    """From values to places along an axis of the drawing."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = map(math.log, (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 1)

    @cached_property
    def ticks(self) -> list[tuple[float, str]]:
        values = _decades(self.low, self.high) if self.log else _even(self.low, self.high)
        return [(self(value), number(value)) for value in values]


@dataclass(frozen=True)
class Scale:
    """A chart on one kind of y axis."""

    name: str
    x: Axis
    y: Axis

    def line(self, series: Series) -> str:
        x, mean, _, _ = series.drawn
        return _path(self.x, self.y, x, mean)

    def band(self, series: Series) -> str:
        """Between the lowest and the highest of each bucket; empty where every point is drawn."""
        x, mean, low, high = series.drawn
        if (low == mean).all():
            return ""
        return _path(self.x, self.y, np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]])) + "Z"

    def places(self, series: Series) -> list[tuple[float, float]]:
        return [(self.x(x), self.y(y)) for x, y in zip(series.x_n, series.y_n, strict=True)]


@dataclass(frozen=True)
class Chart:
    """One chart: what it shows, its lines, and what happened meanwhile.

    With `log` the logarithmic scale is the one that is shown at first; shares and speeds are not `loggable`.
    """

    title: str
    about: str
    series: Sequence[Series]
    marks: Sequence[Mark] = field(default_factory=list)
    log: bool = False
    loggable: bool = True
    width: int = WIDTH
    height: int = HEIGHT

    @cached_property
    def scales(self) -> list[Scale]:
        """The linear one and, where all values allow it and it says more, the logarithmic one; the first is shown."""
        x_n = np.concatenate([one.x_n for one in self.series])
        low, high = self._reach
        x = Axis(float(x_n.min()), float(x_n.max()), LEFT, WIDTH - RIGHT)
        margin = (high - low or abs(high) or 1.0) * 0.05
        ground = 0.0 if 0 <= low < margin * 8 else low - margin
        made = [Scale("linear", x, Axis(ground, high + margin, HEIGHT - BOTTOM, TOP))]
        if self.loggable and low > 0 and high > 1.2 * low:
            made.append(Scale("log", x, Axis(low / 1.05, high * 1.05, HEIGHT - BOTTOM, TOP, log=True)))
        return made[::-1] if self.log else made

    @cached_property
    def _reach(self) -> tuple[float, float]:
        drawn = [one.drawn for one in self.series]
        return float(min(low.min() for _, _, low, _ in drawn)), float(max(high.max() for *_, high in drawn))

    @property
    def banded(self) -> bool:
        """Whether a line stands for more points than are drawn."""
        return any(not one.dots and len(one.x_n) > BUCKETS for one in self.series)

    @cached_property
    def told(self) -> str:
        """The chart in words, for who does not see it."""
        parts = [f"{one.name} from {number(one.y_n[0])} to {number(one.y_n[-1])}" for one in self.series]
        return f"{self.title}: {'; '.join(parts)}"

    @cached_property
    def points(self) -> str:
        """What a pointer shows, as JSON: [name, colour, [x ...], [y ...]] for each line."""
        some = [
            [one.name, one.colour % COLOURS, [_short(x) for x in one.drawn[0]], [_short(y) for y in one.drawn[1]]]
            for one in self.series
        ]
        return json.dumps(some, separators=(",", ":"))


def series(name: str, points: Sequence[tuple[float, float]], **more) -> Series | None:
    """A series of the points that are finite, by step; None where there are none."""
    kept = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if not kept:
        return None
    x_n, y_n = np.array(kept, dtype=np.float64).T
    return Series(name, x_n, y_n, **more)


def number(value: float) -> str:
    """A number as short as can be read: 0.25, 1.2k, 3e-05."""
    value = float(value)
    size = abs(value)
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit * (10 if unit == 1e3 else 1):
            return f"{value / unit:.3g}{name}"
    if size >= 1000:
        return f"{value:,.0f}"
    return "0" if value == 0 else f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def _path(x: Axis, y: Axis, x_n: np.ndarray, y_n: np.ndarray) -> str:
    return "M" + "L".join(f"{x(a):g},{y(b):g}" for a, b in zip(x_n, y_n, strict=True))


def _even(low: float, high: float, wanted: int = 4) -> list[float]:
    rough = (high - low) / wanted
    if not rough > 0:
        return [low]
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * n for n in (1, 2, 2.5, 5, 10) if unit * n >= rough * 0.999)
    return [n * step for n in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    bottom, top = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for parts in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [n * 10.0**e for e in range(bottom, top + 1) for n in parts if low <= n * 10.0**e <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 6)]
    return found or _even(low, high)


def _short(value: float) -> float:
    return float(f"{value:.5g}") if not float(value).is_integer() else int(value)
