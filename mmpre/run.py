"""A run: a directory with what was asked for, what happened, and checkpoints from which it goes on exactly.

run.json        recipe, its numbers, options, versions and the data's fingerprints
metrics.jsonl   one line for each logged step and each held-out evaluation
ledger.jsonl    one line for each sample that could not be used
checkpoints/    step-00001234/ with safetensors and JSON, never pickles
"""

import json
import logging
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmpre import checkpoint
from mmpre.data.index import open_shards
from mmpre.data.ledger import Ledger
from mmpre.data.loader import MicroBatch, MicroBatches, check_world, slots, valid_slots
from mmpre.data.loader import load as load_batches
from mmpre.data.shards import ShardReader, Sidecar
from mmpre.data.units import TooFewSamplesError, Units, describe, measure
from mmpre.draw import hashed
from mmpre.lock import RunLock
from mmpre.loop import Context, Step, held_out, steps
from mmpre.metrics import MetricsWriter
from mmpre.plugins import LoadedRecipe, find_recipe
from mmpre.processes import Processes
from mmpre.progress import Progress
from mmpre.recipe import Recipe, Stage
from mmpre.stopping import Stopper, Watchdog, die_with_parent
from mmpre.strict_json import read as read_json

log = logging.getLogger(__name__)
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is carried out, whatever the recipe. Of these, only `seed`, `precision` and `exact` change results."""

    seed: int = 0  # of the data order, masks, initial weights and dropout
    precision: str = "fp32"  # fp32, or bf16 for autocast
    exact: bool = False  # add gradients in float64: bit-equal results for any number of processes
    workers: int | None = None  # loading processes; by default what the machine's cores allow
    threads: int | None = None  # of this process's arithmetic; by default torch's own choice
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints kept, beside the best one
    log_every: int = 10  # steps between logged steps
    max_holes: float = 0.05  # share of unusable samples past which the run stops
    max_skipped: int = 20  # non-finite steps in a row past which the run stops
    hang_seconds: float = 1800.0  # without a sign of life after which the run ends itself; 0 for never

    def __post_init__(self) -> None:
        problems = []
        if self.precision not in ("fp32", "bf16"):
            problems.append(f"precision must be fp32 or bf16, got {self.precision!r}")
        for name in ("save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                problems.append(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.workers is not None and self.workers < 0:
            problems.append(f"workers must not be negative (0 loads in the trainer itself), got {self.workers}")
        if not 0 <= self.max_holes <= 1:
            problems.append(f"max_holes must lie between 0 and 1, got {self.max_holes}")
        if problems:
            raise ValueError("RunOptions: " + "; ".join(problems))


class RunError(ValueError):
    """A run that cannot be started, resumed or read as asked."""


def train(
    recipe: str | Path | Callable[..., Recipe], *, scale: str | None = None, out: Path | str | None = None,
    options: RunOptions | None = None, **numbers: Any,
) -> Path:  # fmt: skip
    """Pretrain by a recipe: its name, its file, or the function itself. Returns the run's directory.

    `scale` names a set of the recipe's numbers; `numbers` override single ones. A stopped run (SIGTERM, SIGINT) is
    saved and returns as well; `resume` continues it.
    """
    options = options or RunOptions()
    found = find_recipe(recipe)
    chosen = found.numbers(scale, numbers)
    out = Path(out) if out else Path("runs") / f"{found.name}-{scale or 'paper'}-{datetime.now():%Y%m%d-%H%M%S}"
    if (out / "run.json").exists():
        raise RunError(f"{out} already holds a run; continue it with `mmpre resume {out}`, or give another --out")
    record = {
        "format": FORMAT,
        "recipe": {"name": found.name, "digest": found.digest, "file": str(found.path) if found.is_file else None},
        "scale": scale,
        "numbers": chosen,
        "options": asdict(options),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return _Runner(out, record, found, options).go(fresh=True)


def resume(run: Path | str, **changes: Any) -> Path:
    """Continue a run from its newest valid checkpoint; a finished run says so and returns.

    `changes` may be any RunOptions that do not change results (workers, save_every ...), and `data`, `valid`,
    `sidecar` and `valid_sidecar` where the same shards have moved.
    """
    run = Path(run)
    record = _read_record(run)
    fixed = {"seed", "precision", "exact"} & {k for k, v in changes.items() if v != record["options"].get(k)}
    if fixed:
        raise RunError(
            f"resume: {', '.join(sorted(fixed))} would change the results of {run}; start a new run for that"
        )
    moved = {k: changes.pop(k) for k in list(changes) if k in record["numbers"]}
    legal = set(record["options"])
    if unknown := set(changes) - legal:
        raise RunError(f"resume: no option {', '.join(sorted(unknown))}; these exist: {', '.join(sorted(legal))}")
    record["options"] |= changes
    record["numbers"] |= moved
    return _Runner(run, record, _find_again(run, record), RunOptions(**record["options"])).go(fresh=False)


def load(run: Path | str, *, best: bool = False) -> "Run":
    """Open a run to look at it: its record, its recipe, and its network with the newest (or best) weights."""
    run = Path(run)
    record = _read_record(run)
    return Run(run, record, _find_again(run, record), best)


@dataclass(frozen=True)
class Run:
    """A run that is looked at, not continued."""

    path: Path
    record: Mapping[str, Any]
    found: LoadedRecipe
    best: bool = False

    @cached_property
    def recipe(self) -> Recipe:
        """The recipe with the run's weights."""
        recipe = self.untrained()
        checkpoint.restore_model(recipe.module(), self.checkpoint.tensors["model"], strict=True)
        return recipe

    @cached_property
    def checkpoint(self) -> checkpoint.Checkpoint:
        folder = self.path / "checkpoints"
        newest = checkpoint.latest(folder)
        if newest is None:
            raise RunError(f"{folder} holds no valid checkpoint; the run has not saved yet")
        best_step = newest.state["best"]["step"]
        if self.best and best_step is not None and best_step != newest.step:
            return checkpoint.load(checkpoint.path_of(folder, best_step))
        return newest

    def untrained(self) -> Recipe:
        """The recipe with the weights that the run began with."""
        return _build(self.found, self.record["numbers"], self.record["options"]["seed"])


def _build(found: LoadedRecipe, numbers: Mapping[str, Any], seed: int) -> Recipe:
    torch.manual_seed(hashed(seed, "weights"))
    recipe = found.function(**numbers)
    if not isinstance(recipe, Recipe):
        raise RunError(f"recipe {found.name} must return an mmpre.Recipe, it returned {type(recipe).__name__}")
    return recipe


def _read_record(run: Path) -> dict[str, Any]:
    path = run / "run.json"
    if not path.exists():
        raise RunError(f"{run} is not a run: it has no run.json; `mmpre train` makes one")
    record = read_json(path)
    if record.get("format") != FORMAT:
        raise RunError(f"{path} has format {record.get('format')}, this version of mmpre reads format {FORMAT}")
    return record


def _find_again(run: Path, record: Mapping[str, Any]) -> LoadedRecipe:
    kept = run / "recipe.py"
    found = find_recipe(kept if kept.exists() else record["recipe"]["name"], name=record["recipe"]["name"])
    if found.digest != record["recipe"]["digest"]:
        log.warning("recipe %s has changed since %s was started; its numbers are kept", found.name, run)
    return found


class _Runner:
    """Carries a run out: opens data, restores, trains, evaluates, logs and saves."""

    def __init__(self, out: Path, record: dict[str, Any], found: LoadedRecipe, options: RunOptions) -> None:
        self.out, self.record, self.found, self.options = out, record, found, options
        self.checkpoints = out / "checkpoints"
        self.best: dict[str, Any] = {"step": None, "loss": None}
        self.skipped_in_a_row = 0
        self.ledger = Ledger(out / "ledger.jsonl", limit=options.max_holes)

    def go(self, *, fresh: bool) -> Path:
        if self.options.threads:
            torch.set_num_threads(self.options.threads)
        processes = Processes.start()
        if processes.world > 1:
            die_with_parent()
        try:
            recipe = _build(self.found, self.record["numbers"], self.options.seed)
            for stage in recipe.stages:
                check_world(stage.micro_batches, processes.world)
            if processes.rank == 0:
                self.out.mkdir(parents=True, exist_ok=True)
            processes.barrier()
            with RunLock(self.out) if processes.rank == 0 else _nothing():
                self._run(recipe, processes, fresh)
        finally:
            processes.stop()
        return self.out

    def _run(self, recipe: Recipe, processes: Processes, fresh: bool) -> None:
        data = [open_units(stage, stage.data, stage.sidecar) for stage in recipe.stages]
        valid = [
            open_units(stage, stage.valid, stage.valid_sidecar, what="valid") if stage.valid else None
            for stage in recipe.stages
        ]
        fingerprints = [describe(units) for units in data]
        module = recipe.module().to(processes.device)
        start = (0, 0)
        saved = None if fresh else checkpoint.latest(self.checkpoints)
        if not fresh:
            self._same_data(fingerprints)
        elif processes.rank == 0:
            self.record |= {"data": fingerprints, "environment": _environment(processes)}
            self._write_record()
        if saved:
            checkpoint.restore_model(module, saved.tensors["model"], strict=True)
            start = (saved.state["stage"], saved.state["step"])
            self.best, self.skipped_in_a_row = saved.state["best"], saved.state["skipped_in_a_row"]
            self.ledger.load_state(saved.state["ledger"])
        metrics = MetricsWriter(self.out / "metrics.jsonl") if processes.rank == 0 else None
        if metrics:
            checkpoint.sweep(self.checkpoints)
            metrics.truncate_after(_global_step(recipe, *start) - 1)
            self.ledger.truncate_after(_global_step(recipe, *start) - 1)
        if start[0] >= len(recipe.stages):
            print(f"{self.out} is finished: nothing left to train")
            return
        total = sum(stage.steps for stage in recipe.stages)
        with (
            Stopper() as stopper,
            Watchdog(self.options.hang_seconds, self.out, processes.rank) as watchdog,
            Progress(total, self.out, quiet=processes.rank > 0) as progress,
        ):
            for number in range(start[0], len(recipe.stages)):
                leg = _Leg(
                    self,
                    number,
                    recipe,
                    module,
                    data[number],
                    valid[number],
                    processes,
                    metrics,
                    progress,
                    stopper,
                    watchdog,
                )
                first = start[1] if number == start[0] else 0
                if not leg.train(first, saved if number == start[0] else None):
                    progress.say(f"stopped and saved; go on with: mmpre resume {self.out}")
                    return
            progress.say(self.ledger.summary())

    def _same_data(self, fingerprints: list[Mapping[str, Any]]) -> None:
        for number, (was, now) in enumerate(zip(self.record["data"], fingerprints, strict=True)):
            if was["fingerprint"] != now["fingerprint"]:
                raise RunError(
                    f"the data of stage {number} is not what {self.out} was trained on: {was['samples']} samples "
                    f"(fingerprint {was['fingerprint'][:12]}) then, {now['samples']} ({now['fingerprint'][:12]}) now. "
                    "Shards may move, but must be the same, in the same order; start a new run for other data"
                )

    def _write_record(self) -> None:
        if self.found.is_file:
            (self.out / "recipe.py").write_bytes(self.found.path.read_bytes())
        aside = self.out / ".run.json"
        aside.write_text(json.dumps(self.record, indent=2) + "\n")
        os.replace(aside, self.out / "run.json")


class _Leg:
    """One stage of a run."""

    def __init__(self, runner, number, recipe, module, units, valid, processes, metrics, progress, stopper, watchdog):
        self.runner, self.options, self.number, self.recipe = runner, runner.options, number, recipe
        self.stage: Stage = recipe.stages[number]
        self.module: nn.Module = module
        self.units, self.valid = units, valid
        self.processes, self.metrics, self.progress = processes, metrics, progress
        self.stopper, self.watchdog = stopper, watchdog
        self.before = _global_step(recipe, number, 0)
        self.tasks = {task.name: task for task in self.stage.tasks}
        self.context = Context(
            self.options.seed, number, processes, bf16=self.options.precision == "bf16", exact=self.options.exact
        )
        self.names = [n for n, p in module.named_parameters() if not self.stage.frozen(n)]
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(not self.stage.frozen(name))
        trained = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        self.optimizer = self.stage.optimizer.build(trained)

    def train(self, first: int, saved: checkpoint.Checkpoint | None) -> bool:
        """Train the stage from a step on; False where a signal stopped it (after saving)."""
        if saved is not None and first > 0:
            checkpoint.restore_optimizer(
                self.optimizer, self.module, saved.tensors["optimizer"], saved.state["optimizer"]
            )
        batches = self._batches(first)
        try:
            return self._train(first, batches)
        finally:
            batches.close()

    def _train(self, first: int, batches: Iterator[MicroBatch]) -> bool:
        options, step = self.options, first
        self.runner.ledger.begin(self.number, self.units.shards.shares())
        done: Iterator[Step] = steps(
            self.stage, self.module, self.optimizer, batches, self.context, first=first, last=self.stage.steps,
            max_skipped=options.max_skipped, skipped_in_a_row=self.runner.skipped_in_a_row,
        )  # fmt: skip
        since, tokens = time.perf_counter(), 0
        self.watchdog.phase("train", self.before + first)
        for one in done:
            step = one.step + 1
            tokens += one.counts["tokens"]
            self._record(one, since, tokens)
            self.watchdog.phase("train", self.before + step)
            stop = self.processes.any_of([self.stopper.stopping])[0]
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
        self.watchdog.phase("held-out loss", self.before + step)
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
        improved = self.runner.best["loss"] is None or loss < self.runner.best["loss"]
        if improved:
            self.runner.best = {"step": self.before + step, "loss": loss}
        if self.metrics:
            self.metrics.write({"step": self.before + step - 1, "valid": values, "valid_loss": loss, "best": improved})
        self.progress.valid(self.before + step, loss, values)
        return improved

    def _record(self, one: Step, since: float, tokens: int) -> None:
        self.runner.skipped_in_a_row = self.runner.skipped_in_a_row + 1 if one.skipped else 0
        holes = (
            [hole for some in self.processes.gather(list(one.holes)) for hole in some] if one.counts["holes"] else []
        )
        modalities = self.tasks[one.task].view.roles or tuple(self.tasks[one.task].objective.readers)
        self.runner.ledger.add(
            holes, seen=one.counts["rows"] + one.counts["holes"], step=self.before + one.step,
            write=self.metrics is not None, modalities=modalities,
        )  # fmt: skip
        self.runner.ledger.check()
        if self.metrics and (one.skipped or one.step % self.options.log_every == 0):
            line = {"step": self.before + one.step, "task": one.task, "loss": one.loss, **one.values, "norm": one.norm,
                    "lr": one.lr, "tokens": one.counts["tokens"], "rows": one.counts["rows"]}  # fmt: skip
            if one.skipped:
                line |= {"skipped": True, "keys": list(one.keys)}
            seconds = time.perf_counter() - since
            self.metrics.write(
                line | {"time": {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds)}}
            )
        self.progress.step(self.before + one.step + 1, one, tokens / (time.perf_counter() - since))

    def _save(self, step: int) -> None:
        self.watchdog.phase("save", self.before + step)
        self.processes.barrier()
        problem = None
        if self.processes.rank == 0:
            tensors, meta = checkpoint.flatten_optimizer(self.optimizer, self.module)
            ended = step == self.stage.steps
            state = {
                "stage": self.number + 1 if ended else self.number,
                "step": 0 if ended else step,
                "best": self.runner.best,
                "skipped_in_a_row": self.runner.skipped_in_a_row,
                "ledger": self.runner.ledger.state(),
                "optimizer": meta,
            }
            protect = {self.runner.best["step"]} - {None}
            try:
                checkpoint.save(
                    self.runner.checkpoints, self.before + step,
                    {"model": dict(self.module.state_dict(keep_vars=True)), "optimizer": tensors}, state,
                    keep=self.options.keep, protect=protect,
                )  # fmt: skip
            except (OSError, checkpoint.CheckpointError) as e:
                problem = str(e)
        problem = self.processes.gather(problem)[0]
        if problem:
            self.progress.say(f"checkpoint at step {self.before + step} was not written: {problem}")


def open_units(stage: Stage, urls: Sequence[str], sidecar: str | None, *, what: str = "data") -> Units:
    """The units of some shards, cut as a stage's readers want them."""
    if not urls:
        raise RunError(f"no shards: give the recipe's `{what}` (on the command line: --{what} SHARD ...)")
    shards = open_shards(urls)
    readers = [reader for task in stage.tasks for reader in task.objective.readers.values()]
    sidecars = [Sidecar(Path(sidecar), shards)] if sidecar else []
    return measure(Units(ShardReader(shards), sidecars), readers, shards.cache)


def _global_step(recipe: Recipe, stage: int, step: int) -> int:
    return sum(one.steps for one in recipe.stages[:stage]) + step


def _environment(processes: Processes) -> dict[str, Any]:
    packages = {name: version(name) for name in ("mmpre", "torch", "numpy", "tokenizers", "safetensors")}
    return {
        "python": sys.version.split()[0], "machine": platform.platform(), "processes": processes.world,
        "device": str(processes.device), "threads": torch.get_num_threads(), **packages,
    }  # fmt: skip


class _nothing:  # noqa: N801
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None
