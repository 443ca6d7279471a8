"""Optimizers and learning-rate schedules, as values that a recipe names and the training loop builds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


class Schedule(Protocol):
    def factor(self, step: int) -> float:
        """What the peak learning rate is multiplied by at a step, counted from 0."""
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
        if not 0 <= self.warmup < self.total:
            raise ValueError(
                f"Linear: warmup must lie between 0 and total - 1, got warmup {self.warmup} of {self.total} steps; "
                "shorten the warm-up with the steps"
            )

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        left = max(0.0, (self.total - step) / (self.total - self.warmup))
        return self.floor + (1 - self.floor) * left


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up over `warmup` steps, then half a cosine down to `floor` of the peak at step `total`."""

    warmup: int
    total: int
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < self.total:
            raise ValueError(
                f"Cosine: warmup must lie between 0 and total - 1, got warmup {self.warmup} of {self.total} steps; "
                "shorten the warm-up with the steps"
            )

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        passed = min(1.0, (step - self.warmup) / (self.total - self.warmup))
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * passed)) / 2


class Optimizer(Protocol):
    schedule: Schedule

    def build(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Make the optimizer of named parameters. Each group keeps its peak learning rate as `peak_lr`."""
        ...


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017), torch's fused implementation.

    Parameters whose name holds one of `no_decay`, and every parameter with a single dimension where `decay_vectors`
    is False, are not decayed.
    """

    lr: float
    schedule: Schedule
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    no_decay: Sequence[str] = ()
    decay_vectors: bool = False

    def __post_init__(self) -> None:
        problems = []
        if not 0 < self.lr < 100:
            problems.append(f"lr must be above 0 and below 100, got {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas must lie in [0, 1), got {self.betas}")
        if not self.eps > 0:
            problems.append(f"eps must be above 0, got {self.eps}")
        if not self.weight_decay >= 0:
            problems.append(f"weight_decay must not be negative, got {self.weight_decay}")
        if problems:
            raise ValueError("AdamW: " + "; ".join(problems))

    def build(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        decayed, plain = [], []
        for name, parameter in parameters:
            kept = any(part in name for part in self.no_decay) or (parameter.ndim < 2 and not self.decay_vectors)
            (plain if kept else decayed).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay, "peak_lr": self.lr},
            {"params": plain, "weight_decay": 0.0, "peak_lr": self.lr},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> float:
    """Set every group to its peak times the schedule; return the first group's rate."""
    factor = schedule.factor(step)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return optimizer.param_groups[0]["lr"]
