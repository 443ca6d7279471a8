"""Numbers with intervals: what every evaluation returns."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np

from mmpre.data.units import Units
from mmpre.draw import hashed
from mmpre.processes.processes import Processes

RESAMPLES = 1000


class NotMeasured(ValueError):
    """A measure that this network or this machine's data does not allow; says why."""


@dataclass(frozen=True)
class Result:
    """A measure over `n` held-out rows, with a 95 percent bootstrap interval; `chance` is what guessing gives.

    `less` says that a lower value is a better one. `protocol` has what the value depends on and was chosen for it.
    `rows` are the rows' own values where the measure is their mean: two networks are compared row by row.
    """

    name: str
    value: float
    low: float
    high: float
    n: int
    chance: float | None = None
    less: bool = False
    protocol: Mapping[str, Any] = field(default_factory=dict)
    rows: np.ndarray | None = field(default=None, compare=False, repr=False)

    def as_json(self) -> dict[str, Any]:
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name != "rows"}


class Evaluation(Protocol):
    """Measures a network, which it holds, on held-out units. A recipe names the evaluations that fit it."""

    def run(self, units: Units, processes: Processes) -> Sequence[Result]: ...


def mean(
    name: str, per_row: Sequence[float], *, chance: float | None = None, resamples: int = RESAMPLES, **more: Any
) -> Result:
    """The mean over rows with its percentile bootstrap interval; the resampling is drawn from the name alone."""
    rows = np.asarray(per_row, dtype=np.float64)
    _check_some(name, rows)
    rng = np.random.default_rng(hashed("bootstrap", name))
    means = [rows[rng.integers(0, len(rows), len(rows))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Result(name, float(rows.mean()), float(low), float(high), len(rows), chance, rows=rows, **more)


def statistic(
    name: str, measure: Callable[..., float], *columns: np.ndarray, chance: float | None = None,
    resamples: int = RESAMPLES, centred: bool = False, **more: Any,
) -> Result:  # fmt: skip
    """Any measure of rows, such as a median or a rank correlation, with its percentile bootstrap interval.

    With `centred` the resamples' mean is moved onto the value: for a measure that repeated rows lower, such as a rank.
    """
    _check_some(name, columns[0])
    rng, count = np.random.default_rng(hashed("bootstrap", name)), len(columns[0])
    drawn = (rng.integers(0, count, count) for _ in range(resamples))
    value = float(measure(*columns))
    values = np.array([measure(*(one[index] for one in columns)) for index in drawn])
    low, high = np.nanquantile(values + (value - np.nanmean(values) if centred else 0.0), [0.025, 0.975])
    return Result(name, value, float(low), float(high), count, chance, **more)


def gain(trained: Result, untrained: Result) -> dict[str, float] | None:
    """By how much the trained network is better on the same rows, with an interval; None where rows have no values."""
    if trained.rows is None or untrained.rows is None or len(trained.rows) != len(untrained.rows):
        return None
    sign = -1 if trained.less else 1
    found = mean(f"gain {trained.name}", sign * (trained.rows - untrained.rows))
    return {"value": found.value, "low": found.low, "high": found.high}


def _check_some(name: str, rows: Sequence) -> None:
    if len(rows) == 0:
        raise NotMeasured(f"evaluation {name}: there is nothing to average; the data has no row that it applies to")
