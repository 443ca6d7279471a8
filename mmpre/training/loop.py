"""The training loop: one function over objectives, micro-batches and an optimizer.

A step is: count what the losses are divided by, over all processes; forward and backward of each micro-batch; add up
the gradients; clip; update. A micro-batch draws its model randomness (dropout, sampled tokens) from (seed, stage,
step, micro-batch), so nothing depends on how many processes share the step.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mmpre.batch import Batch, Views
from mmpre.data.ledger import Hole
from mmpre.data.loader import MicroBatch
from mmpre.draw import Draw
from mmpre.objectives.loss import Loss
from mmpre.objectives.protocol import InBatch, Objective
from mmpre.processes.processes import Processes
from mmpre.recipe import Stage, Task
from mmpre.training.average import Average
from mmpre.training.gradients import Gradients, Summed, total_norm
from mmpre.training.guard import SpikeGuard, blame, not_finite
from mmpre.training.optim import set_learning_rate


class NonFiniteError(RuntimeError):
    """Too many steps in a row were skipped: a loss or gradient that is not a finite number, or a spike."""


@dataclass(frozen=True)
class Context:
    """What every micro-batch of a stage shares."""

    seed: int
    stage: int
    processes: Processes
    bf16: bool = False
    exact: bool = False

    def autocast(self) -> AbstractContextManager:
        device = self.processes.device.type
        return torch.autocast(device, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def prepare(self, part: "Part") -> tuple[Batch | Views, Draw]:
        """A part on the device and its draw; torch's generators are set from it (dropout reads them)."""
        slot = part.made.slot
        draw = Draw.micro_batch(self.seed, self.stage, slot.step, slot.m).child(slot.kind, part.number)
        torch.manual_seed(draw.hash("model"))
        return part.batch.to(self.processes.device), draw


@dataclass(frozen=True)
class Step:
    """What one step did, as the run records it.

    Where it was skipped, `cause` says what was wrong and `keys` names the samples that may be at fault, over all
    processes. `seconds` is what this process spent on loading and on forward and backward.
    """

    step: int
    task: str
    loss: float
    values: Mapping[str, float]
    norm: float
    lr: float
    counts: Mapping[str, int]
    holes: Sequence[Hole]
    skipped: bool
    keys: Sequence[str]
    cause: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def picked(self) -> dict[str, float]:
        """The share of its role's ordinary tokens that each pick took in this step, as the workers counted them."""
        names = [name.removeprefix("picked:") for name in self.counts if name.startswith("picked:")]
        return {name: self.counts[f"picked:{name}"] / max(1, self.counts[f"ordinary:{name}"]) for name in names}


class Tally:
    """Sums of loss terms and metrics, and what each is divided by once all counts are known."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.per: dict[str, str] = {}
        self.weights: dict[str, float] = {}
        self.parts: list[dict[str, Tensor]] = []

    def add(self, loss: Loss) -> None:
        self.parts.append({term.name: term.sum.detach() for term in loss.terms})
        for term in loss.terms:
            self._add(term.name, term.sum, term.per)
            self.weights[term.name] = term.weight
        for name, (value, per) in loss.metrics.items():
            self._add(name, value, per)

    def values(self, counts: Mapping[str, int], processes: Processes) -> dict[str, float]:
        """Means over all processes, "loss" the weighted sum of the terms; rounded to float32, which hides the order of
        the float64 additions."""
        mine = {f"{name}\n{self.per[name]}": value.item() for name, value in self.sums.items()}
        weights = {name: w for one in processes.gather(self.weights) for name, w in one.items()}
        values, loss = {}, 0.0
        for label, total in processes.sum_by_name(mine).items():
            name, per = label.split("\n")
            mean = total / max(counts.get(per, 0), 1)
            values[name] = torch.tensor(mean, dtype=torch.float32).item()
            loss += weights.get(name, 0.0) * mean
        return {"loss": torch.tensor(loss, dtype=torch.float32).item()} | values

    def _add(self, name: str, value: Tensor, per: str) -> None:
        value = value.detach().double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.per[name] = per


def steps(
    stage: Stage, module: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[MicroBatch], context: Context,
    *, first: int, last: int, max_skipped: int = 20, skipped_in_a_row: int = 0, averages: Sequence[Average] = (),
    gradients: Gradients | None = None, guard: SpikeGuard | None = None,
    phase: Callable[[str, int], None] = lambda name, step: None,
) -> Iterator[Step]:  # fmt: skip
    """Train from step `first` to `last` (exclusive), yielding after each update.

    A loss or gradient that is not finite on any process, or that `guard` refuses, skips the update on all of them.
    Raises NonFiniteError after more than `max_skipped` such steps in a row; the weights are then those before the
    first of them. `phase` is told what is being done.
    """
    processes = context.processes
    names = {name: p for name, p in module.named_parameters() if p.requires_grad}
    parameters = list(names.values())
    gradients = gradients or Summed(parameters, processes, exact=context.exact)
    share = stage.micro_batches // processes.world
    module.train()
    for step in range(first, last):
        task = stage.task_at(step, context.seed)
        phase("loading", step)
        begun = time.perf_counter()
        mine = list(islice(batches, share))
        loaded = time.perf_counter()
        if len(mine) != share or any(made.slot.step != step for made in mine):
            got = [(made.slot.step, made.slot.m) for made in mine]
            raise RuntimeError(f"train: step {step} needs {share} micro-batches, the loader delivered {got}")
        phase("waiting for the other processes", step)
        counts = step_counts(mine, processes)
        phase("forward and backward", step)
        counted, tally = time.perf_counter(), Tally()
        backward(task, mine, counts, gradients, tally, context)
        seconds = {"loading": loaded - begun, "own": time.perf_counter() - counted}
        phase("adding up gradients", step)
        gradients.finish()
        values = tally.values(counts, processes)
        norm = total_norm(parameters)
        finite = processes.all_agree(math.isfinite(values["loss"]) and bool(norm.isfinite()))
        cause, keys = "", []
        if not finite:
            cause, keys = blame(processes.gather(not_finite(mine, tally.parts, names)))
        elif guard is not None:
            cause = guard.refuses(task.name, {"loss": values["loss"], "gradient norm": norm.item()})
            keys = [key for some in processes.gather(_keys(mine)) for key in some] if cause else []
        good = not cause
        lr = set_learning_rate(optimizer, stage.optimizer.schedule, stage.origin.schedule + step)
        if good:
            if stage.clip is not None and norm.item() > stage.clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, stage.clip, norm)
            optimizer.step()
            if hasattr(task.objective, "after_step"):
                task.objective.after_step(step)
            for one in averages:
                one.update(stage.origin.schedule + step)
        optimizer.zero_grad(set_to_none=True)
        skipped_in_a_row = 0 if good else skipped_in_a_row + 1
        yield Step(
            step, task.name, values.pop("loss"), values, norm.item(), lr, counts,
            [hole for made in mine for hole in made.holes], not good, keys, cause, seconds,
        )  # fmt: skip
        if skipped_in_a_row > max_skipped:
            raise NonFiniteError(
                f"{skipped_in_a_row} steps in a row (up to step {step}, task {task.name}) had a loss or gradient that "
                f"is not finite or a spike, the last: {cause}. The weights are still those before them. Lower the "
                "learning rate, or look at the samples that metrics.jsonl names for these steps"
            )


def _keys(batches: Iterable[MicroBatch]) -> list[str]:
    return [key for made in batches for part in made.parts for key in part.keys]


def step_counts(batches: Iterable[MicroBatch], processes: Processes) -> dict[str, int]:
    """Add up the workers' counts over a step's micro-batches and all processes."""
    return processes.sum_by_name(own_counts(batches))


def own_counts(batches: Iterable[MicroBatch]) -> dict[str, int]:
    """The same of this process alone."""
    mine: dict[str, int] = {"rows": 0, "tokens": 0, "holes": 0}
    for made in batches:
        mine["holes"] += len(made.holes)
        for part in made.parts:
            for name, count in part.counts.items():
                mine[name] = mine.get(name, 0) + count
    return mine


class Part(NamedTuple):
    """A part of a micro-batch. A stand-in is run with weight 0, where the processes must run equally many."""

    made: MicroBatch
    number: int
    batch: Batch | Views
    stand_in: bool = False

    @property
    def place(self) -> tuple[int, int]:
        return self.made.slot.m, self.number


def parts_of(batches: Sequence[MicroBatch], gradients: Gradients, processes: Processes) -> list[Part]:
    """This process's parts; where the gradients need processes to meet, filled up with stand-ins (its own last part,
    or another process's first one if all its rows are holes)."""
    mine = [Part(made, number, part) for made in batches for number, part in enumerate(made.parts)]
    if not gradients.together or processes.world == 1:
        return mine
    numbers = processes.gather(len(mine))
    wanted = gradients.parts(numbers, processes.rank)
    spare = mine[-1] if mine else None
    if 0 in numbers and any(numbers):
        lender = next(rank for rank, number in enumerate(numbers) if number)
        lent = processes.gather(mine[0] if processes.rank == lender else None)[lender]
        spare = spare or lent
    return mine + [spare._replace(stand_in=True)] * (wanted - len(mine)) if spare else []


def backward(
    task: Task, batches: Sequence[MicroBatch], counts: Mapping[str, int], gradients: Gradients, tally: Tally,
    context: Context,
) -> None:  # fmt: skip
    """Forward and backward of a step's micro-batches; gradients and sums are left in `gradients` and `tally`."""
    parts = parts_of(batches, gradients, context.processes)
    if isinstance(task.objective, InBatch):
        _backward_in_batch(task.objective, parts, counts, gradients, tally, context)
        return
    for i, part in enumerate(parts):
        batch, draw = context.prepare(part)
        with gradients.part(last=i == len(parts) - 1):
            with context.autocast():
                total, loss = gradients.run(_forward, task.objective, batch, draw, counts)
            (total * 0.0 if part.stand_in else total).backward()
        gradients.add()
        if not part.stand_in:
            tally.add(loss)


def _forward(objective: Objective, batch: Batch | Views, draw: Draw, counts: Mapping[str, int]) -> tuple[Tensor, Loss]:
    """The one tensor that is differentiated, and the sums to be told."""
    loss = objective(batch, draw)
    return loss.total(counts), loss.detached()


def _backward_in_batch(
    objective: InBatch, parts: Sequence[Part], counts: Mapping[str, int], gradients: Gradients, tally: Tally,
    context: Context,
) -> None:  # fmt: skip
    """Features of every micro-batch without a graph, the loss over all of them, then each one's backward.

    Features are made twice with the same randomness, so memory holds one micro-batch's graph at a time and the
    gradient is that of the whole step's batch (gradient caching, Gao et al. 2021, arXiv:2101.06983).
    """
    processes = context.processes
    mine = []
    for part in parts:
        with torch.no_grad(), context.autocast():
            features = gradients.run(objective.features, *context.prepare(part))
        if not part.stand_in:
            mine.append(features)
    leaves = _gather_in_order(mine, [part.place for part in parts if not part.stand_in], processes)
    if not leaves:
        return
    names = list(next(iter(leaves.values())))
    joined = {name: torch.cat([one[name] for one in leaves.values()]) for name in names}
    sizes = [len(one[names[0]]) for one in leaves.values()]
    with gradients.part(last=False):
        total, loss, hooks = gradients.run(_loss_of_all, objective, joined, sizes, counts, processes.rank == 0)
        total.backward()
    gradients.add()
    for hook in hooks:
        hook.remove()
    if processes.rank == 0:
        tally.add(loss)
    for i, part in enumerate(parts):
        with gradients.part(last=i == len(parts) - 1):
            with context.autocast():
                features = gradients.run(objective.features, *context.prepare(part))
            grads = [
                torch.zeros_like(features[n]) if part.stand_in else leaves[part.place][n].grad.to(features[n].dtype)
                for n in names
            ]
            torch.autograd.backward([features[name] for name in names], grads)
        gradients.add()


def _loss_of_all(
    objective: InBatch, features: Mapping[str, Tensor], sizes: Sequence[int], counts: Mapping[str, int], own: bool
) -> tuple[Tensor, Loss, list[RemovableHandle]]:
    """Every process computes the same loss: the gradient of its own parameters (a temperature) counts where `own`."""
    mine = [] if own else [p.register_hook(torch.zeros_like) for p in objective.parameters() if p.requires_grad]
    loss = objective.loss(features, sizes)
    return loss.total(counts), loss.detached(), mine


def _gather_in_order(
    mine: Sequence[Mapping[str, Tensor]], places: Sequence[tuple[int, int]], processes: Processes
) -> dict[tuple[int, int], dict[str, Tensor]]:
    """The features of all processes as float32 leaves, by (micro-batch, part), in that order."""
    notes = processes.gather([(place, len(next(iter(one.values())))) for place, one in zip(places, mine, strict=True)])
    names = next((names for names in processes.gather(list(mine[0]) if mine else None) if names), [])
    shapes = next(
        (s for s in processes.gather({n: tuple(mine[0][n].shape[1:]) for n in names} if mine else None) if s), {}
    )
    found: dict[tuple[int, int], dict[str, Tensor]] = {place: {} for note in notes for place, _ in note}
    for name in names:
        own = [one[name].float() for one in mine]
        everyone = processes.gather_rows(
            torch.cat(own) if own else torch.zeros(0, *shapes[name], device=processes.device)
        )
        for note, theirs in zip(notes, everyone, strict=True):
            for (place, _), part in zip(note, theirs.split([size for _, size in note]), strict=True):
                found[place][name] = part.detach().clone().requires_grad_()
    return {place: found[place] for place in sorted(found)}


@torch.no_grad()
def held_out(
    batches: Iterable[MicroBatch], tasks: Mapping[str, Task], context: Context, gradients: Gradients | None = None
) -> dict[str, dict[str, float]]:
    """Loss and metrics of every task on held-out micro-batches, by task.

    Takes nothing from the run's randomness: every micro-batch sets its own, and so does the next training step.
    """
    gradients = gradients or Summed([], context.processes, exact=context.exact)
    tallies = {name: Tally() for name in tasks}
    counts = {name: Counter(own_counts([])) for name in tasks}
    training = {name: task.objective.training for name, task in tasks.items()}
    for task in tasks.values():
        task.objective.eval()
    for made in batches:
        name = made.slot.task
        counts[name].update(own_counts([made]))
        for part in parts_of([made], gradients, context.processes):
            loss = gradients.run(_held_out, tasks[name].objective, context, *context.prepare(part))
            if not part.stand_in:
                tallies[name].add(loss)
    for name, task in tasks.items():
        task.objective.train(training[name])
    found = {}
    for name, tally in tallies.items():
        counted = context.processes.sum_by_name(dict(counts[name]))
        values = tally.values(counted, context.processes)
        found[name] = values if counted.get("rows") else {"loss": float("nan")}  # no row could be read
    return found


def _held_out(objective: Objective | InBatch, context: Context, batch: Batch | Views, draw: Draw) -> Loss:
    """A loss that compares rows sees those of a micro-batch alone: fewer than in training where a step has several."""
    if not isinstance(objective, InBatch):
        with context.autocast():
            return objective(batch, draw)
    with context.autocast():
        features = objective.features(batch, draw)
    return objective.loss({name: one.float() for name, one in features.items()}, [batch.counts["rows"]])
