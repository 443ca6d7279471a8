"""One stage of a run: its steps, held-out losses, metrics and checkpoints."""

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmpre.data.ledger import Ledger, TooManyHolesError
from mmpre.data.loader import MicroBatch, MicroBatches, slots, valid_slots
from mmpre.data.loader import load as load_batches
from mmpre.data.mixture import Mixture
from mmpre.data.prefetch import LoadingError, Prefetch
from mmpre.data.shards import StorageError
from mmpre.data.units import Units
from mmpre.exchange.imports import start_of
from mmpre.processes.processes import Processes
from mmpre.processes.stopping import Stopper, Watchdog
from mmpre.recipe import Recipe, Stage
from mmpre.runs import checkpoint
from mmpre.runs.metrics import MetricsWriter
from mmpre.runs.options import RunOptions
from mmpre.runs.progress import Progress
from mmpre.runs.starts import begin
from mmpre.training import gradients, parallel
from mmpre.training.compiling import compile_parts
from mmpre.training.guard import SpikeGuard
from mmpre.training.loop import Context, NonFiniteError, Step, held_out, steps

log = logging.getLogger(__name__)
Moments = tuple[Mapping[str, Tensor], Mapping[str, Any]]  # what checkpoint.flatten_optimizer gives
# what a checkpoint's state says of a run: the stage and the step in it, and what Session carries on
STATE = ("stage", "step", "best", "skipped", "skipped_in_a_row", "held_out_due", "guard", "ledger", "optimizer")


class SaveError(checkpoint.CheckpointError):
    """A checkpoint could not be written, and the run must not go on without."""


class _Stopping(Exception):
    """A signal came during a held-out evaluation."""


@dataclass
class Session:
    """What the stages of a run share while a process carries it out. `metrics` is None but on the first process.

    `skipped` counts the run's skipped steps, `unsaved` the saves that failed in a row. `held_out_due` is True where a
    signal came before the held-out loss of the step was taken; it is taken first when the run goes on.
    """

    checkpoints: Path
    options: RunOptions
    recipe: Recipe
    module: nn.Module
    root: gradients.Root
    processes: Processes
    ledger: Ledger
    metrics: MetricsWriter | None
    progress: Progress
    stopper: Stopper
    watchdog: Watchdog
    best: dict[str, Any] = field(default_factory=lambda: {"step": None, "loss": None})
    skipped: int = 0
    skipped_in_a_row: int = 0
    held_out_due: bool = False
    guard: Mapping[str, Any] = field(default_factory=dict)
    unsaved: int = 0
    step: int = 0  # that the run has come to


class Leg:
    """The `number`-th stage of a session, on its units and (or None) its held-out units."""

    def __init__(self, session: Session, number: int, units: Mixture, valid: Units | None) -> None:
        self.session, self.number, self.units, self.valid = session, number, units, valid
        self.options, self.processes, self.module = session.options, session.processes, session.module
        self.stage: Stage = session.recipe.stages[number]
        self.before = global_step(session.recipe, number, 0)
        self.tasks = {task.name: task for task in self.stage.tasks}
        self.context = Context(
            self.options.seed, number, self.processes, bf16=self.options.precision == "bf16", exact=self.options.exact
        )
        self.averages = session.recipe.averages(number)
        session.recipe.set_trained(number)
        self.gradients = parallel.choose(self.options.parallel, session.root, self.processes, exact=self.options.exact)
        if self.options.compile:
            compile_parts(self.module)
        self.trained = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        self.optimizer = self.stage.optimizer.build(self.trained.items())
        self.guard = SpikeGuard(self.options.spike)
        self.saved = 0  # the step of this stage that was saved last
        self.unread = False  # whether a held-out row that cannot be read was told of

    def take_up(self, first: int, moments: Moments | None) -> None:
        """Be where step `first` of the stage begins.

        `moments` is an optimizer's state: this stage's, or at step 0 that of the stage before, if there was one.
        """
        self.saved = first
        if first == 0:
            self._begin(moments)
        elif moments is not None:
            checkpoint.restore_optimizer(self.optimizer, self.module, *moments)
            self.guard.load_state(self.session.guard)

    def train(self, first: int) -> bool:
        """Train the stage from a step on; False where a signal stopped it (after saving)."""
        batches = self._batches(first)
        self.session.watchdog.also = batches.describe
        try:
            return self._train(first, batches)
        except (RuntimeError, OSError) as e:
            if isinstance(e, LoadingError | StorageError | TooManyHolesError | NonFiniteError):
                self._keep_what_is_done()  # the weights are those of the last step's end
            if not isinstance(e, LoadingError):
                batches.check()
            raise
        finally:
            batches.close()
            self.session.watchdog.also = str

    def _begin(self, moments: Moments | None) -> None:
        """Put in place what the stage starts from, and take over what it carries on."""
        starts, before = list(self.stage.start), []
        self.session.best = {"step": None, "loss": None}  # stages' held-out losses are of other rows and tasks
        if self.number:
            before = self.session.recipe.averages(self.number - 1)
        elif self.options.init:
            starts.append(start_of(self.options.init))
        for line in begin(starts, self.module, self.averages, before):
            self.session.progress.say(line)
        if self.stage.carry.optimizer and moments is not None:
            tensors, plain = (self._of_trained(some) for some in (moments[0], moments[1]["plain"]))
            meta = {"plain": plain, "tensors": len(tensors)}
            checkpoint.restore_optimizer(self.optimizer, self.module, tensors, meta)

    def _of_trained(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """Those entries of an optimizer's state whose parameters this stage trains too."""
        return {label: value for label, value in entries.items() if label.rpartition("/")[0] in self.trained}

    def _train(self, first: int, batches: Iterator[MicroBatch]) -> bool:
        options, watchdog = self.options, self.session.watchdog
        batches = self.waiting = _Waiting(batches)
        self.session.ledger.begin(self.number, self.units.shares())
        done: Iterator[Step] = steps(
            self.stage, self.module, self.optimizer, batches, self.context, first=first, last=self.stage.steps,
            max_skipped=options.max_skipped, skipped_in_a_row=self.session.skipped_in_a_row, averages=self.averages,
            gradients=self.gradients, guard=self.guard,
            phase=lambda name, step: watchdog.phase(name, self.before + step),
        )  # fmt: skip
        if self.session.held_out_due:
            self._validate(first)
            if self.session.held_out_due:
                return False
        since, tokens = time.perf_counter(), 0
        for one in done:
            step = one.step + 1
            self.session.step = self.before + step
            tokens += one.counts["tokens"]
            watchdog.phase("recording", self.before + one.step)
            last = step == self.stage.steps
            best, improved = self.session.best, False
            self.session.held_out_due = self.valid is not None and (last or step % self.stage.valid_every == 0)
            self._record(one, since, tokens)
            stop = self._stopping()
            if self.session.held_out_due and (last or not stop):
                improved = self._validate(step, to_the_end=last)
                stop = stop or self.session.held_out_due or self._stopping()
            if stop or last or improved or (self.before + step) % options.save_every == 0:
                saved = self._save(step, must=stop or last)
                if improved and not saved:
                    self.session.best = best  # these weights are not kept, those of the former best are
            if stop:
                return last and self.number + 1 == len(self.session.recipe.stages)
        return True

    def _stopping(self) -> bool:
        """Has any process been asked to stop?"""
        return self.processes.any_of([self.session.stopper.stopping])[0]

    def _batches(self, first: int) -> Prefetch[MicroBatch]:
        stage, rank, world = self.stage, self.processes.rank, self.processes.world
        order = slots(stage, self.options.seed, first, stage.steps, rank, world)
        workers = self.options.workers
        if workers is None:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", world))  # the cores of this machine, not of all
            workers = max(1, min(4, (os.cpu_count() or 2) // here - 1))
        return load_batches(self._source(self.units), order, workers, pin=self.processes.device.type == "cuda")

    def _source(self, units: Units | Mixture, *, held_out: bool = False) -> MicroBatches:
        return MicroBatches.of(self.stage, units, seed=self.options.seed, number=self.number, held_out=held_out)

    def _held_out_batches(self, step: int, to_the_end: bool) -> Iterator[MicroBatch]:
        source, rank, world = self._source(self.valid, held_out=True), self.processes.rank, self.processes.world
        for slot in valid_slots(self.stage, min(self.stage.valid_rows, len(self.valid)), rank, world):
            if not to_the_end and slot.m == rank and self._stopping():
                raise _Stopping
            self.session.watchdog.phase("held-out loss", self.before + step)
            made = source[slot]
            if made.holes and not self.unread:
                self.unread = True
                log.warning("held-out rows cannot be read, such as %s; mmpre eval tells how many", made.holes[0].told())
            yield made

    def _validate(self, step: int, *, to_the_end: bool = False) -> bool:
        """Held-out losses; True where their mean, weighted by the tasks' ratios, is the best so far.

        A signal ends it, and then it remains due, unless it goes `to_the_end` (that of a stage).
        """
        stage = self.stage
        try:
            values = held_out(self._held_out_batches(step, to_the_end), self.tasks, self.context, self.gradients)
        except _Stopping:
            return False
        self.session.held_out_due = False
        for name in (name for name, one in values.items() if math.isnan(one["loss"])):
            self.session.progress.say(f"held out: task {name} has no loss that is a number; can its rows be read?")
        ratios = {task.name: task.ratio for task in stage.tasks}
        loss = sum(ratios[name] * one["loss"] for name, one in values.items()) / sum(ratios.values())
        best = self.session.best["loss"]
        improved = math.isfinite(loss) and (best is None or loss < best)
        if improved:
            self.session.best = {"step": self.before + step, "loss": loss}
        if self.session.metrics:
            self.session.metrics.write(
                {"step": self.before + step - 1, "valid": values, "valid_loss": loss, "best": improved}
            )
        self.session.progress.valid(self.before + step, loss, values)
        return improved

    def _record(self, one: Step, since: float, tokens: int) -> None:
        self.session.skipped += one.skipped
        self.session.skipped_in_a_row = self.session.skipped_in_a_row + 1 if one.skipped else 0
        holes = (
            [hole for some in self.processes.gather(list(one.holes)) for hole in some] if one.counts["holes"] else []
        )
        self.session.ledger.add(
            holes, seen=one.counts["rows"] + one.counts["holes"], step=self.before + one.step,
            write=self.session.metrics is not None, modalities=self.tasks[one.task].roles,
        )  # fmt: skip
        logged = one.skipped or one.step % self.options.log_every == 0
        ranks = self.processes.gather({name: round(one.seconds[name], 4) for name in one.seconds}) if logged else []
        if self.session.metrics and logged:
            line = {"step": self.before + one.step, "task": one.task, "loss": one.loss, **one.values, "norm": one.norm,
                    "lr": one.lr, "tokens": one.counts["tokens"], "rows": one.counts["rows"],
                    "picked": one.picked}  # fmt: skip
            if one.skipped:
                line |= {"skipped": True, "cause": one.cause, "keys": list(one.keys)}
                self.session.progress.say(f"step {self.before + one.step} was skipped: {one.cause}")
            seconds = time.perf_counter() - since
            times = {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds)}
            times |= {"waited": round(self.waiting.seconds, 3), "processes": ranks}
            self.session.metrics.write(line | {"time": times})
        self.session.progress.step(self.before + one.step + 1, one, tokens / (time.perf_counter() - since))
        self.session.ledger.check()

    def _keep_what_is_done(self) -> None:
        """Save before an error ends the run, where no other process may be elsewhere.

        A stage's last step is left to be done again: what comes after it, such as its held-out loss, is not done.
        """
        step = self.session.step - self.before
        if self.processes.world > 1 or not 0 < step < self.stage.steps or step == self.saved:
            return
        try:
            self._save(step, must=True)
            self.session.progress.say(f"saved step {self.session.step}, the last one before an error")
        except (SaveError, OSError) as e:
            log.warning("%s", e)

    def _save(self, step: int, *, must: bool) -> bool:
        """Save; a failure is told and the run goes on, unless it ends here or too many failed in a row."""
        self.session.watchdog.phase("save", self.before + step)
        if self.session.metrics and self.session.metrics.also:
            self.session.metrics.also.flush()
        self.processes.barrier()
        problem = None
        # where parameters are shared out, every process takes part in putting them together
        weights = gradients.full(self.module.state_dict(keep_vars=True))
        tensors, meta = checkpoint.flatten_optimizer(self.optimizer, self.module)
        tensors = gradients.full(tensors)
        if self.processes.rank == 0:
            ended = step == self.stage.steps
            state = {
                "stage": self.number + 1 if ended else self.number,
                "step": 0 if ended else step,
                "best": self.session.best,
                "skipped": self.session.skipped,
                "skipped_in_a_row": self.session.skipped_in_a_row,
                "held_out_due": self.session.held_out_due,
                "guard": {} if ended else self.guard.state(),
                "ledger": self.session.ledger.state(),
                "optimizer": meta,
            }
            protect = {self.session.best["step"]} - {None}
            try:
                checkpoint.save(
                    self.session.checkpoints, self.before + step,
                    {"model": weights, "optimizer": tensors}, state,
                    keep=self.options.keep, protect=protect,
                )  # fmt: skip
            except Exception as e:  # whatever it is, the other processes wait for an answer
                problem = str(e) if isinstance(e, checkpoint.CheckpointError) else f"{type(e).__name__}: {e}"
        problem = self.processes.gather(problem)[0]
        self.session.unsaved = self.session.unsaved + 1 if problem else 0
        if not problem:
            self.saved = step
            return True
        told = f"checkpoint at step {self.before + step} was not written: {problem}"
        if must or self.session.unsaved > self.options.max_unsaved:
            how = "the run ends here" if must else f"{self.session.unsaved} saves in a row have failed"
            raise SaveError(
                f"{told}; {how}. Make room, then go on from the last one that was saved with `mmpre resume`"
            )
        self.session.progress.say(f"{told}; training goes on, {self.options.max_unsaved} may fail in a row")
        return False


class _Waiting:
    """Takes the time that training waits for data; far below the whole time means that loading keeps up."""

    def __init__(self, batches: Iterator[MicroBatch]) -> None:
        self.batches, self.seconds = batches, 0.0

    def __iter__(self) -> "_Waiting":
        return self

    def __next__(self) -> MicroBatch:
        begun = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.seconds += time.perf_counter() - begun


def global_step(recipe: Recipe, stage: int, step: int) -> int:
    """A step of a stage, counted from the start of the run."""
    return sum(one.steps for one in recipe.stages[:stage]) + step
