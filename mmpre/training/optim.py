"""Optimizers, as values that a recipe names and the training loop builds."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from mmpre.schedules import Schedule
from mmpre.training.lamb import Lamb
from mmpre.training.uncompiled import FusedAdamW


class Optimizer(Protocol):
    schedule: Schedule

    def build(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Make the optimizer of named parameters. Each group keeps its peak learning rate as `peak_lr`."""
        ...


@dataclass(frozen=True, kw_only=True)
class LayerDecay:
    """Learning rates that fall by `rate` with every layer towards the input.

    Heads and the closing norm have the full rate, the last layer `rate` of it, the first of n layers `rate` to the
    n-th, what comes before it (the modalities) `rate` to the (n+1)-th: as in BEiT, Bao et al. 2021, arXiv:2106.08254.
    (ELECTRA's published code raises to one power more.) `layer` finds a layer's number in a parameter's name, `below`
    the names of what comes before.
    """

    rate: float
    layer: str = r"^network\.encoder\.blocks\.(\d+)\."
    below: str = r"^network\.modalities\."

    def __post_init__(self) -> None:
        if not 0 < self.rate <= 1:
            raise ValueError(f"LayerDecay: rate must lie between 0 and 1, got {self.rate}; three quarters are 0.75")

    def factors(self, names: Sequence[str]) -> list[float]:
        """For each parameter, what its learning rate is multiplied by."""
        layers = [re.search(self.layer, name) for name in names]
        depth = max((int(found[1]) + 1 for found in layers if found), default=0)
        if not depth:
            raise ValueError(
                f"LayerDecay: no parameter's name fits {self.layer!r}; the names are like {', '.join(names[:3])}"
            )
        powers = [
            depth - int(found[1]) if found else (depth + 1 if re.search(self.below, name) else 0)
            for name, found in zip(names, layers, strict=True)
        ]
        return [self.rate**power for power in powers]


@dataclass(frozen=True, kw_only=True)
class _Adaptive:
    """What AdamW and LAMB share: their numbers, and which parameters get which of them."""

    lr: float
    schedule: Schedule
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    no_decay: Sequence[str] = ()
    decay_vectors: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)
    layers: LayerDecay | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be above 0 and below 100, got {lr}"
            for name, lr in {"lr": self.lr, **{f"rates[{part!r}]": lr for part, lr in self.rates.items()}}.items()
            if not 0 < lr < 100
        ]
        if not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas must lie in [0, 1), got {self.betas}")
        if not self.eps > 0:
            problems.append(f"eps must be above 0, got {self.eps}")
        if not self.weight_decay >= 0:
            problems.append(f"weight_decay must not be negative, got {self.weight_decay}")
        if problems:
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems))

    def groups(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
        """Parameters of one learning rate and decay each; those with the rate `lr` come first."""
        named = list(parameters)
        names = [name for name, _ in named]
        self._check_parts(names)
        factors = self.layers.factors(names) if self.layers else [1.0] * len(names)
        found: dict[tuple[float, float], list[nn.Parameter]] = {}
        for (name, parameter), factor in zip(named, factors, strict=True):
            kept = any(part in name for part in self.no_decay) or (parameter.ndim < 2 and not self.decay_vectors)
            lr = factor * next((rate for part, rate in self.rates.items() if part in name), self.lr)
            found.setdefault((lr, 0.0 if kept else self.weight_decay), []).append(parameter)
        groups = [{"params": some, "weight_decay": decay, "peak_lr": lr} for (lr, decay), some in found.items()]
        return sorted(groups, key=lambda group: (group["peak_lr"] != self.lr, group["weight_decay"] == 0))

    def _check_parts(self, names: Sequence[str]) -> None:
        """Every part of a name that was given must be in some parameter's, and no parameter may have two rates."""
        problems = [
            f"no trained parameter has {part!r} in its name"
            for part in (*self.rates, *self.no_decay)
            if not any(part in name for name in names)
        ]
        for name in names:
            fits = [part for part in self.rates if part in name]
            if len(fits) > 1:
                problems.append(f"{name} has more than one rate, by {' and by '.join(map(repr, fits))}")
                break
        if problems:
            told = f"the names are like {', '.join(names[:3])}"
            raise ValueError(f"{type(self).__name__}: " + "; ".join(problems) + f"; {told}")


@dataclass(frozen=True, kw_only=True)
class AdamW(_Adaptive):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2017), torch's fused implementation.

    Parameters whose name holds one of `no_decay`, and every parameter with a single dimension where `decay_vectors`
    is False, are not decayed. A step shrinks the others by `weight_decay` times the learning rate or, with
    `decay_by_schedule`, by `weight_decay` times the schedule's factor alone, which is the paper's own rule and that of
    MosaicML's DecoupledAdamW. Without `bias_correction` the moments count as they are, as in BERT's and ELECTRA's own
    code, which makes the first steps longer. `rates` are peak learning rates of parameters whose name holds a part, in
    place of `lr`; `layers` makes them fall towards the input.
    """

    decay_by_schedule: bool = False
    bias_correction: bool = True

    def build(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        groups = self.groups(parameters)
        if self.decay_by_schedule:
            groups = [group | {"weight_decay": group["weight_decay"] / group["peak_lr"]} for group in groups]
        if not self.bias_correction:
            groups = [group | {"adapt": False, "correct": False} for group in groups]
            return Lamb(groups, lr=self.lr, betas=self.betas, eps=self.eps)
        return FusedAdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps)


@dataclass(frozen=True, kw_only=True)
class LAMB(_Adaptive):
    """Adam's direction and the decay's, in each parameter scaled to the parameter's length (You et al. 2019).

    What is decayed, and how `rates` and `layers` are read, is as in AdamW. Parameters that are not decayed are not
    scaled either, as in the authors' code.
    """

    eps: float = 1e-6

    def build(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        groups = [group | {"adapt": group["weight_decay"] > 0} for group in self.groups(parameters)]
        return Lamb(groups, lr=self.lr, betas=self.betas, eps=self.eps)


def set_learning_rate(optimizer: torch.optim.Optimizer, schedule: Schedule, step: int) -> float:
    """Set every group to its peak times the schedule; return the first group's rate."""
    factor = schedule.factor(step)
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return optimizer.param_groups[0]["lr"]
