"""One stage of a run: its steps, held-out losses, metrics and checkpoints."""

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmpre import checkpoint
from mmpre.average import trainable
from mmpre.data.ledger import Ledger
from mmpre.data.loader import MicroBatch, MicroBatches, slots, valid_slots
from mmpre.data.loader import load as load_batches
from mmpre.data.units import TooFewSamplesError, Units
from mmpre.loop import Context, Step, held_out, steps
from mmpre.metrics import MetricsWriter
from mmpre.options import RunOptions
from mmpre.processes import Processes
from mmpre.progress import Progress
from mmpre.recipe import Recipe, Stage
from mmpre.starts import begin
from mmpre.stopping import Stopper, Watchdog

Moments = tuple[Mapping[str, Tensor], Mapping[str, Any]]  # what checkpoint.flatten_optimizer gives


@dataclass
class Session:
    """What the stages of a run share while a process carries it out. `metrics` is None but on the first process."""

    checkpoints: Path
    options: RunOptions
    recipe: Recipe
    module: nn.Module
    processes: Processes
    ledger: Ledger
    metrics: MetricsWriter | None
    progress: Progress
    stopper: Stopper
    watchdog: Watchdog
    best: dict[str, Any] = field(default_factory=lambda: {"step": None, "loss": None})
    skipped_in_a_row: int = 0


class Leg:
    """The `number`-th stage of a session, on its units and (or None) its held-out units."""

    def __init__(self, session: Session, number: int, units: Units, valid: Units | None) -> None:
        self.session, self.number, self.units, self.valid = session, number, units, valid
        self.options, self.processes, self.module = session.options, session.processes, session.module
        self.stage: Stage = session.recipe.stages[number]
        self.before = global_step(session.recipe, number, 0)
        self.tasks = {task.name: task for task in self.stage.tasks}
        self.context = Context(
            self.options.seed, number, self.processes, bf16=self.options.precision == "bf16", exact=self.options.exact
        )
        self.averages = session.recipe.averages(number)
        for name, parameter in trainable(self.module).items():
            parameter.requires_grad_(not self.stage.frozen(name))
        self.trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.optimizer = self.stage.optimizer.build(self.trained.items())

    def train(self, first: int, moments: Moments | None) -> bool:
        """Train the stage from a step on; False where a signal stopped it (after saving).

        `moments` is an optimizer's state: this stage's, or at step 0 that of the stage before, if there was one.
        """
        if first == 0:
            self._begin(moments)
        elif moments is not None:
            checkpoint.restore_optimizer(self.optimizer, self.module, *moments)
        batches = self._batches(first)
        try:
            return self._train(first, batches)
        finally:
            batches.close()

    def _begin(self, moments: Moments | None) -> None:
        """Put in place what the stage starts from, and take over what it carries on."""
        starts, before = list(self.stage.start), []
        if self.number:
            before = self.session.recipe.averages(self.number - 1)
        for line in begin(starts, self.module, self.averages, before):
            self.session.progress.say(line)
        if self.stage.carry.optimizer and moments is not None:
            tensors, meta = moments
            plain = self._of_trained(meta["plain"])
            checkpoint.restore_optimizer(self.optimizer, self.module, self._of_trained(tensors), {"plain": plain})

    def _of_trained(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Those entries of an optimizer's state whose parameters this stage trains too."""
        return {label: value for label, value in entries.items() if label.rpartition("/")[0] in self.trained}

    def _train(self, first: int, batches: Iterator[MicroBatch]) -> bool:
        options, step = self.options, first
        self.session.ledger.begin(self.number, self.units.shards.shares())
        done: Iterator[Step] = steps(
            self.stage, self.module, self.optimizer, batches, self.context, first=first, last=self.stage.steps,
            max_skipped=options.max_skipped, skipped_in_a_row=self.session.skipped_in_a_row, averages=self.averages,
        )  # fmt: skip
        since, tokens = time.perf_counter(), 0
        self.session.watchdog.phase("train", self.before + first)
        for one in done:
            step = one.step + 1
            tokens += one.counts["tokens"]
            self._record(one, since, tokens)
            self.session.watchdog.phase("train", self.before + step)
            stop = self.processes.any_of([self.session.stopper.stopping])[0]
            last = step == self.stage.steps
            improved = False
            if self.valid is not None and not stop and (last or step % self.stage.valid_every == 0):
                improved = self._validate(step)
            if stop or last or improved or (self.before + step) % options.save_every == 0:
                self._save(step)
            if stop:
                return False
        return True

    def _batches(self, first: int):
        stage, rank, world = self.stage, self.processes.rank, self.processes.world
        if len(self.units) < stage.batch:
            raise TooFewSamplesError(
                f"a step takes {stage.batch} rows, the data has {len(self.units)} units; "
                "give more data or a smaller batch"
            )
        order = slots(stage, self.options.seed, first, stage.steps, rank, world)
        workers = self.options.workers
        if workers is None:
            workers = max(1, min(4, (os.cpu_count() or 2) // world - 1))
        return load_batches(self._source(self.units), order, workers, pin=self.processes.device.type == "cuda")

    def _source(self, units: Units) -> MicroBatches:
        return MicroBatches.of(self.stage, units, seed=self.options.seed, number=self.number)

    def _validate(self, step: int) -> bool:
        """Held-out losses; True where their mean, weighted by the tasks' ratios, is the best so far."""
        self.session.watchdog.phase("held-out loss", self.before + step)
        stage = self.stage
        rows = min(stage.valid_rows, len(self.valid))
        source = self._source(self.valid)
        values = held_out(
            (source[slot] for slot in valid_slots(stage, rows, self.processes.rank, self.processes.world)),
            self.tasks,
            self.context,
        )
        ratios = {task.name: task.ratio for task in stage.tasks}
        loss = sum(ratios[name] * one["loss"] for name, one in values.items()) / sum(ratios.values())
        improved = self.session.best["loss"] is None or loss < self.session.best["loss"]
        if improved:
            self.session.best = {"step": self.before + step, "loss": loss}
        if self.session.metrics:
            self.session.metrics.write(
                {"step": self.before + step - 1, "valid": values, "valid_loss": loss, "best": improved}
            )
        self.session.progress.valid(self.before + step, loss, values)
        return improved

    def _record(self, one: Step, since: float, tokens: int) -> None:
        self.session.skipped_in_a_row = self.session.skipped_in_a_row + 1 if one.skipped else 0
        holes = (
            [hole for some in self.processes.gather(list(one.holes)) for hole in some] if one.counts["holes"] else []
        )
        self.session.ledger.add(
            holes, seen=one.counts["rows"] + one.counts["holes"], step=self.before + one.step,
            write=self.session.metrics is not None, modalities=self.tasks[one.task].roles,
        )  # fmt: skip
        self.session.ledger.check()
        if self.session.metrics and (one.skipped or one.step % self.options.log_every == 0):
            line = {"step": self.before + one.step, "task": one.task, "loss": one.loss, **one.values, "norm": one.norm,
                    "lr": one.lr, "tokens": one.counts["tokens"], "rows": one.counts["rows"],
                    "picked": one.picked}  # fmt: skip
            if one.skipped:
                line |= {"skipped": True, "keys": list(one.keys)}
            seconds = time.perf_counter() - since
            self.session.metrics.write(
                line | {"time": {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds)}}
            )
        self.session.progress.step(self.before + one.step + 1, one, tokens / (time.perf_counter() - since))

    def _save(self, step: int) -> None:
        self.session.watchdog.phase("save", self.before + step)
        self.processes.barrier()
        problem = None
        if self.processes.rank == 0:
            tensors, meta = checkpoint.flatten_optimizer(self.optimizer, self.module)
            ended = step == self.stage.steps
            state = {
                "stage": self.number + 1 if ended else self.number,
                "step": 0 if ended else step,
                "best": self.session.best,
                "skipped_in_a_row": self.session.skipped_in_a_row,
                "ledger": self.session.ledger.state(),
                "optimizer": meta,
            }
            protect = {self.session.best["step"]} - {None}
            try:
                checkpoint.save(
                    self.session.checkpoints, self.before + step,
                    {"model": dict(self.module.state_dict(keep_vars=True)), "optimizer": tensors}, state,
                    keep=self.options.keep, protect=protect,
                )  # fmt: skip
            except (OSError, checkpoint.CheckpointError) as e:
                problem = str(e)
        problem = self.processes.gather(problem)[0]
        if problem:
            self.session.progress.say(f"checkpoint at step {self.before + step} was not written: {problem}")


def global_step(recipe: Recipe, stage: int, step: int) -> int:
    """A step of a stage, counted from the start of the run."""
    return sum(one.steps for one in recipe.stages[:stage]) + step
