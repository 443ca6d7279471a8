"""A recipe: the stages of a paper's pretraining, each with its tasks, data, optimizer and schedule."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from torch import nn

from mmpre.data.mixture import Source, sources
from mmpre.data.order import permute
from mmpre.draw import hashed
from mmpre.evaluation.results import Evaluation
from mmpre.modality import Reader
from mmpre.objectives.protocol import InBatch, Objective
from mmpre.runs.starts import Carry, Origin, Start
from mmpre.schedules import BatchRamp, LengthRamp
from mmpre.training.average import Average, averages
from mmpre.training.optim import Optimizer
from mmpre.view import Dealt, View


@dataclass(frozen=True)
class Task:
    """A view of the data and what is learned from it. `ratio` is the task's share of the steps, in whole parts.

    Several views by name make several batches of the same samples, which the objective gets as `Views`. Held-out losses
    are taken on rows of `held_out`, by default of the same view: so that recipes which hide more or less can be
    compared on rows of which the same share is hidden.
    """

    name: str
    view: View | Dealt | Mapping[str, View]
    objective: Objective | InBatch
    ratio: int = 1
    held_out: View | Dealt | Mapping[str, View] | None = None

    @property
    def readers(self) -> list[Reader]:
        """What reads the rows of this task, in each of its views."""
        views = list(self.view.values()) if isinstance(self.view, Mapping) else [self.view]
        return [reader for view in views for reader in {**self.objective.readers, **view.readers}.values()]

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that rows of this task have."""
        views = list(self.view.values()) if isinstance(self.view, Mapping) else [self.view]
        every = tuple(self.objective.readers)
        return tuple(dict.fromkeys(role for view in views for role in view.roles or every))


def _whole(ratio: object) -> bool:
    return isinstance(ratio, int) and ratio >= 1


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One leg of a run.

    `batch` rows make a step, dealt to `micro_batches` parts (fixed by the recipe, so that the split over processes
    changes nothing); a `ramp` lets it grow to that. `window` and `block` shape the data order: units are permuted in
    blocks, then within windows of blocks. `data` are shards, or several sources by name, mixed by their weights
    (`Source`, or texts as `NAME@WEIGHT=SHARDS`). Held-out loss is taken on `valid` every `valid_every` steps.

    A stage goes on with the weights of the one before, after what `start` puts in place of some of them; optimizer,
    schedule and data begin anew but for what `carry` names. For rows that grow longer, let stages follow each other
    whose readers cut other windows, or, for a smooth growth, bound them by `length`; held-out rows have no bound.
    `frozen` says of a parameter's name, as in `Recipe.module()`, whether the stage leaves it alone. `origin` is set by
    the recipe.
    """

    tasks: Sequence[Task]
    data: Sequence[str] | Mapping[str, Source]
    sidecar: str | None = None
    valid: Sequence[str] = ()
    valid_sidecar: str | None = None
    steps: int
    batch: int
    micro_batches: int = 1
    optimizer: Optimizer
    clip: float | None = None
    frozen: Callable[[str], bool] = field(default=lambda name: False)
    valid_every: int = 500
    valid_rows: int = 512
    block: int = 8
    window: int = 4096
    max_tokens: int | None = None
    ramp: BatchRamp | None = None
    length: LengthRamp | None = None
    start: Sequence[Start] = ()
    carry: Carry = field(default_factory=Carry)
    origin: Origin = field(default_factory=Origin)

    def __post_init__(self) -> None:
        names = [task.name for task in self.tasks]
        problems = []
        try:
            sources(self.data, self.sidecar)
        except ValueError as e:
            problems.append(str(e))
        if not names or len(set(names)) != len(names):
            problems.append(f"tasks need different names, got {names}")
        problems += [
            f"task {t.name}: ratio must be a whole number above 0, got {t.ratio}"
            for t in self.tasks
            if not _whole(t.ratio)
        ]
        for name in ("steps", "batch", "micro_batches", "valid_every", "valid_rows", "block", "window"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps * self.batch >= 1 << 62:
            problems.append(f"steps x batch must stay below 2^62 rows, got {self.steps:,} x {self.batch:,}")
        if self.micro_batches > self.batch:
            problems.append(f"micro_batches ({self.micro_batches}) must not exceed batch ({self.batch})")
        if self.clip is not None and not self.clip > 0:
            problems.append(f"clip must be above 0 (or None for no clipping), got {self.clip}")
        if self.ramp is not None and min(self.batch, self.micro_batches) > 0:
            problems += self.ramp.problems(self.batch, self.micro_batches)
        if self.length is not None:
            problems += [
                f"task {task.name}: a length ramp needs a reader that can shorten rows (`shortens`), as TextReader can"
                for task in self.tasks
                if not any(getattr(reader, "shortens", False) for reader in task.readers)
            ]
        if self.max_tokens is not None and self.max_tokens < 1:
            problems.append(f"max_tokens must be at least 1 (or None), got {self.max_tokens}")
        if problems:
            raise ValueError("Stage: " + "; ".join(problems))

    @cached_property
    def _cycle(self) -> list[int]:
        return [i for i, task in enumerate(self.tasks) for _ in range(task.ratio)]

    def task_at(self, step: int, seed: int) -> Task:
        """The task of a step: exact shares in every cycle of `sum of ratios` steps, shuffled within it."""
        cycle = self._cycle
        number, place = divmod(step, len(cycle))
        return self.tasks[cycle[int(permute(np.array([place]), len(cycle), hashed(seed, "task", number))[0])]]

    def batch_at(self, step: int) -> tuple[int, int]:
        """The first position of a step in the stream of units, and how many rows it takes."""
        start, size = step * self.batch, self.batch
        if self.ramp is not None:
            start, size = self.ramp.at(step, self.batch, self.micro_batches)
        return self.origin.data + start, size

    def length_at(self, step: int) -> int | None:
        """The most tokens that a step's rows may have of what a reader can shorten, or None for no bound."""
        return None if self.length is None else self.length.at(step)


@dataclass(frozen=True)
class Recipe:
    """What a recipe function returns: the stages, and the network that is evaluated, embedded with and exported.

    `modules` names further ones with parameters that no task owns; `evaluations` is what `mmpre eval` measures beside
    the tasks' held-out losses. `towers` says, by role, what makes one vector of a row in a space that the roles share:
    what retrieval between roles goes by. Parameters that have no gradients when the recipe is made, such as those of a
    frozen front or of an average, are named by `still`: no stage trains them.
    """

    stages: Sequence[Stage]
    network: nn.Module
    modules: Mapping[str, nn.Module] = field(default_factory=dict)
    evaluations: Sequence[Evaluation] = ()
    towers: Mapping[str, nn.Module] = field(default_factory=dict)
    still: frozenset[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        stages: list[Stage] = []
        for stage in self.stages:
            stages.append(replace(stage, origin=_origin(stage, stages)))
        object.__setattr__(self, "stages", stages)
        still = (name for name, parameter in self.module().named_parameters() if not parameter.requires_grad)
        object.__setattr__(self, "still", frozenset(still))

    def set_trained(self, number: int) -> None:
        """Give gradients to what a stage trains: all but what it freezes and what is `still`."""
        for name, parameter in self.module().named_parameters():
            parameter.requires_grad_(name not in self.still and not self.stages[number].frozen(name))

    def averages(self, number: int) -> list[Average]:
        """The averages that follow their networks in a stage: those of its tasks, and those that no task owns."""
        parts = [self.network, *self.modules.values(), *(task.objective for task in self.stages[number].tasks)]
        return list({id(one): one for part in parts for one in averages(part)}.values())

    def module(self) -> nn.ModuleDict:
        """Everything with parameters, under names that do not depend on the stage: what a checkpoint holds."""
        tasks = {
            f"{i}_{task.name}" if len(self.stages) > 1 else task.name: task.objective
            for i, stage in enumerate(self.stages)
            for task in stage.tasks
        }
        return nn.ModuleDict({"network": self.network, **self.modules, "tasks": nn.ModuleDict(tasks)})


def _origin(stage: Stage, before: Sequence[Stage]) -> Origin:
    """Where a stage's counts begin, from the stages before it. Raises ValueError where it cannot carry on from them."""
    number, carry, problems = len(before), stage.carry, []
    if not before:
        if carry != Carry():
            raise ValueError("Recipe: the first stage has no stage before it to carry anything over from")
        return Origin()
    last = before[-1]
    if carry.optimizer and type(stage.optimizer) is not type(last.optimizer):
        kinds = f"{type(last.optimizer).__name__} and {type(stage.optimizer).__name__}"
        problems.append(f"the optimizer's state cannot be carried between {kinds}")
    if carry.data:
        for name in ("data", "sidecar", "block", "window"):
            was, now = getattr(last, name), getattr(stage, name)
            if was != now:
                problems.append(f"its data can go on only where {name} is the same, got {was!r} and then {now!r}")
    if problems:
        raise ValueError(f"Recipe: stage {number} cannot carry on from stage {number - 1}: {'; '.join(problems)}")
    return Origin(
        schedule=last.origin.schedule + last.steps if carry.schedule else 0,
        data=last.batch_at(last.steps)[0] if carry.data else 0,
        order=(number - 1 if last.origin.order is None else last.origin.order) if carry.data else None,
    )
