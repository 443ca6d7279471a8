"""Numbers with intervals: what every evaluation returns."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from mmpre.data.units import Units
from mmpre.draw import hashed
from mmpre.processes import Processes


@dataclass(frozen=True)
class Result:
    """A measure over `n` held-out rows, with a 95 percent bootstrap interval; `chance` is what guessing gives."""

    name: str
    value: float
    low: float
    high: float
    n: int
    chance: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Evaluation(Protocol):
    """Measures the network that it was made with on held-out units. A recipe names the evaluations that fit it."""

    def run(self, units: Units, processes: Processes) -> Sequence[Result]: ...


def mean(name: str, per_row: Sequence[float], *, chance: float | None = None, resamples: int = 1000) -> Result:
    """The mean over rows with its percentile bootstrap interval; the resampling is drawn from the name alone."""
    rows = np.asarray(per_row, dtype=np.float64)
    if len(rows) == 0:
        raise ValueError(f"evaluation {name}: there is nothing to average; the data has no row that it applies to")
    rng = np.random.default_rng(hashed("bootstrap", name))
    means = rows[rng.integers(0, len(rows), (resamples, len(rows)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Result(name, float(rows.mean()), float(low), float(high), len(rows), chance)
