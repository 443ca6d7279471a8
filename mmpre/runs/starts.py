"""What a stage begins with: the weights that the stage before left, and what is put in their place."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from mmpre.runs.checkpoint import CheckpointError, of_run, restore_model
from mmpre.training.average import Average


class Start(Protocol):
    """Puts weights into a run's modules when a stage begins, before its first step; says in a line what it did."""

    def fill(self, module: nn.Module) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Carry:
    """What a stage takes over from the one before, beside the weights, where it would start anew.

    `optimizer`: the moments of parameters that both train. `schedule`: steps of the learning rate (and of ramped
    averages) are counted on. `data`: the rows go on after the last one of the stage before, in its order; both stages
    must have the same shards, cut into the same units.
    """

    optimizer: bool = False
    schedule: bool = False
    data: bool = False


@dataclass(frozen=True)
class Origin:
    """Where a stage's counts begin: steps of its schedule, rows of its data.

    `order` is the number of the stage in whose order the rows come, None for its own.
    """

    schedule: int = 0
    data: int = 0
    order: int | None = None


@dataclass(frozen=True, kw_only=True)
class Copied:
    """Start `into` from another part of the same recipe, as it is when the stage begins.

    Parts are names in `Recipe.module()`, such as "network.encoder" or "tasks.1_distil.teacher". A frozen teacher is a
    module of its own that is filled so; weights of an `Average` are under its name and ".module".
    """

    source: str
    into: str

    def fill(self, module: nn.Module) -> str:
        source, into = part(module, self.source), part(module, self.into)
        _restore(into, {name: tensor.clone() for name, tensor in source.state_dict().items()}, repr(self))
        return f"{self.into} starts from {self.source}"


@dataclass(frozen=True, kw_only=True)
class FromRun:
    """Start `into` from the same or another part (`source`) of another run, from its newest or best weights."""

    run: str
    source: str = "network"
    into: str | None = None
    best: bool = False

    def fill(self, module: nn.Module) -> str:
        saved, into, prefix = of_run(Path(self.run), best=self.best), self.into or self.source, f"{self.source}."
        tensors = {n.removeprefix(prefix): t for n, t in saved.tensors["model"].items() if n.startswith(prefix)}
        if not tensors:
            parts = sorted({name.split(".")[0] for name in saved.tensors["model"]})
            raise ValueError(f"FromRun: {self.run} has no part {self.source!r}; its parts begin with {parts}")
        _restore(part(module, into), tensors, repr(self))
        return f"{into} starts from {self.source} of {self.run}, step {saved.step}"


def part(module: nn.Module, name: str) -> nn.Module:
    """A part of a recipe's modules by its name. Raises ValueError that says how far the name leads."""
    found = module
    for i, step in enumerate(name.split(".")):
        inner = dict(found.named_children())
        if step not in inner:
            place = ".".join(name.split(".")[:i]) or "the recipe"
            raise ValueError(f"no part {name!r}: {place} has no {step!r}; it has {', '.join(inner) or 'no parts'}")
        found = inner[step]
    return found


def _restore(module: nn.Module, tensors: Mapping[str, Tensor], who: str) -> None:
    try:
        restore_model(module, tensors)
    except CheckpointError as e:
        raise CheckpointError(f"{who}: {e}") from None


@torch.no_grad()
def begin(starts: Sequence[Start], module: nn.Module, now: Sequence[Average], before: Sequence[Average]) -> list[str]:
    """Carry out a stage's starts, and return what was done.

    Averages begin at what their networks hold then; those that followed them in the stage before go on, unless there
    were starts.
    """
    told = [start.fill(module) for start in starts]
    for one in now:
        if starts or one not in before:
            one.restart()
    return told
