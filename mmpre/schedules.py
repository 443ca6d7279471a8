"""Numbers that depend on the step alone: learning-rate schedules, and ramps of other numbers.

All are pure functions of the step, so that a resumed run goes on with the same ones. A warm-up of `warmup` steps rises
from 1 / (warmup + 1) of the peak and is at the peak at step `warmup`, the first after it. The code of several papers
(BERT, ELECTRA, UNITER, LXMERT and others) begins at 0 instead, so that its first step changes nothing: all rates of a
warm-up are a step later there.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


class Schedule(Protocol):
    def factor(self, step: int) -> float:
        """What the peak learning rate is multiplied by at a step, counted from 0."""
        ...


@runtime_checkable
class Ramp(Protocol):
    def at(self, step: int) -> float:
        """The number's value at a step, counted from 0."""
        ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear warm-up over `warmup` steps, then constant."""

    warmup: int = 0

    def factor(self, step: int) -> float:
        return min(1.0, (step + 1) / (self.warmup + 1))


@dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear warm-up over `warmup` steps, then linear decay to `floor` of the peak at step `total`."""

    warmup: int
    total: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        _check(self, self.warmup, self.total, self.floor)

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        left = max(0.0, (self.total - step) / (self.total - self.warmup))
        return self.floor + (1 - self.floor) * left


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up over `warmup` steps, then half a cosine down to `floor` of the peak at step `total`.

    With a `cooldown`, the cosine ends that many steps earlier and the rate falls linearly from `floor` to 0 at `total`
    (GPT-BERT, Charpentier & Samuel 2024, arXiv:2410.24159).
    """

    warmup: int
    total: int
    floor: float = 0.0
    cooldown: int = 0

    def __post_init__(self) -> None:
        _check(self, self.warmup, self.total, self.floor, self.cooldown)

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        end = self.total - self.cooldown
        if self.cooldown and step >= end:
            return self.floor * max(0.0, (self.total - step) / self.cooldown)
        passed = min(1.0, (step - self.warmup) / (end - self.warmup))
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * passed)) / 2


@dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """Linear warm-up over `warmup` steps, then falling with the root of the step, but not below `floor` of the peak.

    Source: Vaswani et al. 2017, arXiv:1706.03762. It has no end: steps may be added to a run.
    """

    warmup: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        _check(self, self.warmup, None, self.floor)

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return max(self.floor, math.sqrt((self.warmup + 1) / (step + 1)))


@dataclass(frozen=True, kw_only=True)
class WSD:
    """Warm-up, stable, decay: the peak is held until `decay` steps before `total`, then linear to `floor` of it.

    Source: Hu et al. 2024 (MiniCPM), arXiv:2404.06395, with the linear decay of Gisserot-Boukhlef et al. 2025
    (arXiv:2507.00994).
    """

    warmup: int
    total: int
    decay: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        _check(self, self.warmup, self.total, self.floor, self.decay)

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if step <= self.total - self.decay:
            return 1.0
        left = max(0.0, (self.total - step) / max(self.decay, 1))
        return self.floor + (1 - self.floor) * left


@dataclass(frozen=True, kw_only=True)
class LinearRamp:
    """From `first` at step 0 to `last` at step `steps`, and `last` from then on."""

    first: float
    last: float
    steps: int

    def at(self, step: int) -> float:
        return self.last + (self.first - self.last) * max(0.0, 1 - step / max(self.steps, 1))


@dataclass(frozen=True, kw_only=True)
class CosineRamp:
    """From `first` at step 0 to `last` at step `steps` by half a cosine, and `last` from then on."""

    first: float
    last: float
    steps: int

    def at(self, step: int) -> float:
        return self.last - (self.last - self.first) * (1 + math.cos(math.pi * min(1.0, step / max(self.steps, 1)))) / 2


@dataclass(frozen=True, kw_only=True)
class ExponentialRamp:
    """From `first` at step 0, each step times `factor`, but not below `last`."""

    first: float
    last: float
    factor: float

    def __post_init__(self) -> None:
        if not 0 < self.last <= self.first or not 0 < self.factor <= 1:
            raise ValueError(f"ExponentialRamp: wanted 0 < last <= first and 0 < factor <= 1, got {self}")

    def at(self, step: int) -> float:
        return max(self.last, self.first * self.factor**step)


@dataclass(frozen=True, kw_only=True)
class BatchRamp:
    """Steps of `first` rows that grow linearly, over `steps` steps, to the stage's batch.

    A step's first row is a closed form, the sum of the line so far rounded down to a multiple of the micro-batches; its
    size is what is left to the next step's. So sizes are such multiples too, and stray from the line by less than one.
    """

    first: int
    steps: int

    def at(self, step: int, batch: int, multiple: int) -> tuple[int, int]:
        """The first row of a step, and how many it takes, on the way to `batch` rows."""
        start = self._start(step, batch, multiple)
        return start, self._start(step + 1, batch, multiple) - start

    def problems(self, batch: int, multiple: int) -> list[str]:
        found = []
        if self.steps < 1 or not 0 < self.first <= batch:
            found.append(f"ramp must take at least 1 step, from at most {batch} rows, got {self}")
        if self.first % multiple or batch % multiple:
            found.append(f"with a ramp, its first and batch must be multiples of micro_batches ({multiple}), got "
                         f"{self.first} and {batch}")  # fmt: skip
        return found

    def _start(self, step: int, batch: int, multiple: int) -> int:
        t = min(step, self.steps)
        doubled = 2 * self.first * self.steps * t + (batch - self.first) * t * t
        return doubled // (2 * self.steps * multiple) * multiple + (step - t) * batch


def _check(schedule: Schedule, warmup: int, total: int | None, floor: float, last: int = 0) -> None:
    """Refuse a schedule whose parts do not fit into its steps. `last` are the steps of a part at its end."""
    name, problems = type(schedule).__name__, []
    if total is None and warmup < 0:
        problems.append(f"warmup must not be negative, got {warmup}")
    if total is not None and not 0 <= warmup < total:
        problems.append(
            f"warmup must lie between 0 and total - 1, got warmup {warmup} of {total} steps; "
            "shorten the warm-up with the steps"
        )
    elif total is not None and not 0 <= last < total - warmup + isinstance(schedule, WSD):
        part = "decay" if isinstance(schedule, WSD) else "cooldown"
        problems.append(f"{part} must fit behind the warm-up, got {part} {last}, warmup {warmup} of {total} steps")
    if not 0 <= floor <= 1:
        problems.append(f"floor is a share of the peak, between 0 and 1, got {floor}")
    if problems:
        raise ValueError(f"{name}: " + "; ".join(problems))


@dataclass(frozen=True, kw_only=True)
class LengthRamp:
    """Rows of at most `first` tokens, a bound that grows linearly, over `steps` steps, to `last`; no bound after them.

    Source: sequence length warm-up, Li et al. 2021, arXiv:2108.06084, where rows are cut off; here a longer row is
    replaced by a shorter window of it (the reader's business), so that in other epochs other parts of it are read.
    """

    first: int
    last: int
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1 or not 1 <= self.first <= self.last:
            raise ValueError(f"LengthRamp: wanted at least 1 step and 1 <= first <= last, got {self}")

    def at(self, step: int) -> int | None:
        """The most tokens that a row of a step may have; None where there is no bound any more."""
        return None if step >= self.steps else self.first + (self.last - self.first) * step // self.steps
