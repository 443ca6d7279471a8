"""Steps that must not change the weights: what is not finite and where, and (if asked for) sudden spikes."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from mmpre.data.loader import MicroBatch
from mmpre.training.gradients import local

NAMED = 5  # parameters that a message names


class SpikeGuard:
    """Refuses a step whose loss or gradient norm stands far above those of its task before.

    Far is `limit` deviations above the median of the last `window` values; a deviation is the median distance from
    that median, times 1.4826 (the standard deviation of a normal distribution), and at least a hundredth of it. What
    is refused or not finite never enters the window, so one bad step cannot make the next ones look bad or good. The
    window is part of a checkpoint (`state`). A limit of 0 refuses nothing.
    """

    def __init__(self, limit: float, *, window: int = 128, minimum: int = 16) -> None:
        self.limit, self.window, self.minimum = limit, window, minimum
        self._seen: dict[str, dict[str, deque[float]]] = {}

    def refuses(self, task: str, values: Mapping[str, float]) -> str:
        """Why the step is refused, or an empty text; then its values enter the window."""
        if not self.limit or not all(math.isfinite(value) for value in values.values()):
            return ""
        seen = self._seen.setdefault(task, {name: deque(maxlen=self.window) for name in values})
        reasons = [self._reason(name, value, seen[name]) for name, value in values.items()]
        reason = "; ".join(filter(None, reasons))
        if not reason:
            for name, value in values.items():
                seen[name].append(value)
        return reason

    def _reason(self, name: str, value: float, seen: Sequence[float]) -> str:
        if len(seen) < self.minimum:
            return ""
        middle = median(seen)
        deviation = max(1.4826 * median(abs(one - middle) for one in seen), 0.01 * abs(middle))
        if value <= middle + self.limit * deviation:
            return ""
        return f"{name} {value:.6g} is a spike: the median of {len(seen)} before is {middle:.6g} +- {deviation:.2g}"

    def state(self) -> dict[str, dict[str, list[float]]]:
        return {task: {name: list(one) for name, one in seen.items()} for task, seen in self._seen.items()}

    def load_state(self, state: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        self._seen = {
            task: {name: deque(one, maxlen=self.window) for name, one in seen.items()} for task, seen in state.items()
        }


@dataclass(frozen=True)
class NotFinite:
    """What of a step is not finite on one process: loss terms, gradients, and the samples that may be at fault."""

    losses: Sequence[str]
    gradients: Sequence[str]
    keys: Sequence[str]


def not_finite(
    batches: Sequence[MicroBatch], sums: Sequence[Mapping[str, Tensor]], parameters: Mapping[str, nn.Parameter]
) -> NotFinite:
    """What is not finite here. `sums` are the loss terms of each part, in order; where they are fewer (a loss over all
    rows of the step) or all finite, every sample of the step may be at fault."""
    parts = [(made, part) for made in batches for part in made.parts]
    losses, keys = [], []
    for i, terms in enumerate(sums):
        bad = [name for name, value in terms.items() if not bool(torch.isfinite(value).all())]
        if bad and len(sums) == len(parts):
            losses.append(f"loss {', '.join(bad)} of micro-batch {parts[i][0].slot.m}")
            keys += parts[i][1].keys
        elif bad:
            losses.append(f"loss {', '.join(bad)}")
    grads = {name: local(one.grad) for name, one in parameters.items() if one.grad is not None}
    bad = [name for name, grad in grads.items() if not bool(grad.isfinite().all())]
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    gradients = [f"gradient of {', '.join(bad[:NAMED])}{more}"] if bad else []
    return NotFinite(losses, gradients, keys or [key for _, part in parts for key in part.keys])


def blame(told: Sequence[NotFinite]) -> tuple[str, list[str]]:
    """The cause of a skipped step and the keys of the samples that may be at fault, from what all processes found."""
    losses = [loss for one in told for loss in one.losses]
    gradients = dict.fromkeys(gradient for one in told for gradient in one.gradients)
    causes = [f"{cause} is not finite" for cause in (*losses, *gradients)]
    keys = [key for one in told if one.losses or not losses for key in one.keys]
    return "; ".join(causes) or "the loss or the gradient's norm is too large for its numbers", keys
