"""A run: a directory with what was asked for, what happened, and checkpoints from which it goes on exactly.

run.json        recipe, its numbers, options, versions and the data's fingerprints
files/          copies of the small files that its numbers name, such as a tokenizer.json: the run needs no others
metrics.jsonl   one line for each logged step and each held-out evaluation
ledger.jsonl    one line for each sample that could not be used
checkpoints/    step-00001234/ with safetensors and JSON, never pickles
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mmpre.data.index import open_shards
from mmpre.data.ledger import Ledger
from mmpre.data.loader import check_world
from mmpre.data.mixture import Mixture, sources
from mmpre.data.shards import ShardReader, Sidecar
from mmpre.data.units import TooFewSamplesError, Units, measure
from mmpre.draw import hashed
from mmpre.plugins import LoadedRecipe, PluginError, file_digest, find_recipe
from mmpre.processes.peers import check_alike, digest_of_code, digest_of_weights, first_cause
from mmpre.processes.processes import Processes
from mmpre.processes.signs import Signs
from mmpre.processes.stopping import UNDER_AGENT, Stopper, Watchdog, die_with_parent
from mmpre.recipe import Recipe, Stage
from mmpre.runs import checkpoint
from mmpre.runs.leg import STATE, Leg, Session, global_step
from mmpre.runs.lock import LockedError, RunLock
from mmpre.runs.loggers import Loggers
from mmpre.runs.metrics import MetricsWriter
from mmpre.runs.options import RunOptions
from mmpre.runs.progress import Progress
from mmpre.runs.record import begin, conclude, make_folder, open_record, packages, read_record, restart, take_up
from mmpre.runs.record_check import FORMAT, RunError, check_changes, differences
from mmpre.training.gradients import Root

__all__ = ["Run", "RunError", "load", "open_units", "resume", "train"]
log = logging.getLogger(__name__)
NEVER_SECONDS = 365 * 86_400.0  # that a collective waits where no watchdog is wanted


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
        other = differences(read_record(out), found, chosen, options)
        what = f". It was started with other settings: {other}" if other else ""
        raise RunError(f"{out} already holds a run; continue it with `mmpre resume {out}`, or give another --out{what}")
    return _carry_out(out, new_record(found, scale, chosen, options), found, options, fresh=True)


def new_record(
    found: LoadedRecipe, scale: str | None, numbers: Mapping[str, Any], options: RunOptions
) -> dict[str, Any]:
    """What run.json says of a run from its start on."""
    return {
        "format": FORMAT,
        "recipe": {"name": found.name, "digest": found.digest, "file": str(found.path) if found.is_file else None},
        "scale": scale,
        "numbers": dict(numbers),
        "options": asdict(options),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def resume(run: Path | str, **changes: Any) -> Path:
    """Continue a run from its newest valid checkpoint; a finished run says so and returns.

    `changes` may be any RunOptions that do not change results (workers, save_every ...), and `data`, `valid`,
    `sidecar` and `valid_sidecar` where the same shards have moved.
    """
    run = Path(run)
    record = open_record(run)
    check_changes(record, changes, run)
    moved = {name: changes.pop(name) for name in list(changes) if name in record["numbers"]}
    record["options"] |= changes
    record["numbers"] |= moved
    return _carry_out(run, record, _find_again(run, record), RunOptions(**record["options"]), fresh=False, moved=moved)


def load(run: Path | str, *, best: bool = False) -> "Run":
    """Open a run to look at it: its record, its recipe, and its network with the newest (or best) weights."""
    run = Path(run)
    record = open_record(run)
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
        return checkpoint.of_run(self.path, best=self.best)

    def untrained(self) -> Recipe:
        """The recipe with the weights that it draws before anything is put in their place."""
        return build(self.found, self.record["numbers"], self.record["options"]["seed"])


def build(found: LoadedRecipe, numbers: Mapping[str, Any], seed: int) -> Recipe:
    """A recipe with the weights that a seed draws."""
    torch.manual_seed(hashed(seed, "weights"))
    recipe = found.build(numbers)
    if not isinstance(recipe, Recipe):
        raise RunError(f"recipe {found.name} must return an mmpre.Recipe, it returned {type(recipe).__name__}")
    return recipe


def _find_again(run: Path, record: Mapping[str, Any]) -> LoadedRecipe:
    """The recipe of a run: the installed one of its name, or, where a file was given, the copy that the run keeps."""
    name, digest = record["recipe"]["name"], record["recipe"]["digest"]
    if record["recipe"]["file"] is None:
        try:
            found = find_recipe(name)
        except PluginError as e:
            raise RunError(f"{run} cannot be opened: {e}") from None
        if found.digest != digest:
            log.warning("recipe %s has changed since %s was started; its numbers are kept", name, run)
    else:
        kept = run / "recipe.py"
        if file_digest(kept) != digest:
            was = record["recipe"]["file"]
            raise RunError(f"{kept} is not the recipe that the run was started with; put back {was}")
        found = find_recipe(kept, name=name)
    found.check(record["numbers"], found.defaults(None))
    return found


def _carry_out(
    out: Path, record: dict[str, Any], found: LoadedRecipe, options: RunOptions, *, fresh: bool,
    moved: Mapping[str, Any] = MappingProxyType({}),
) -> Path:  # fmt: skip
    """Train what is left of a run, alone on its folder. `moved` is where its data is found now."""
    threads = torch.get_num_threads()
    if options.arithmetic_threads:
        torch.set_num_threads(options.arithmetic_threads)
    if UNDER_AGENT in os.environ:
        die_with_parent()
    processes = Processes.start(options.hang_seconds + 60 if options.hang_seconds else NEVER_SECONDS)
    try:
        out = Path(processes.gather(str(out))[0])  # a name made of the time may differ between processes
        recipe = build(found, record["numbers"], options.seed)
        for stage in recipe.stages:
            check_world(stage.micro_batches, processes.world)
        with _alone(out, recipe, processes), first_cause(out, processes):
            data, valid = _open_data(recipe)
            held_out = [None if units is None else units.describe() for units in valid]
            told = {"data": [units.describe() for units in data], "valid": held_out}
            _check_processes(record, found, told, recipe, processes)
            if fresh or "data" not in record:  # without data: weights that were imported
                begin(out, record, found, told, processes)
            else:
                take_up(out, record, told, processes, moved)
            _train_stages(out, record, recipe, data, valid, options, processes, fresh)
    finally:
        processes.stop()
        torch.set_num_threads(threads)
    return out


@contextmanager
def _alone(out: Path, recipe: Recipe, processes: Processes) -> Iterator[None]:
    """Hold the run's lock for all of its processes; where it cannot be had, all of them say so."""
    with ExitStack() as held:
        problem: Exception | None = None
        if processes.rank == 0:
            try:
                make_folder(out, recipe)
                held.enter_context(RunLock(out))
            except (LockedError, RunError, OSError) as e:
                problem = e
        if problem := processes.gather(problem)[0]:
            raise problem
        yield


def _check_processes(
    record: Mapping[str, Any], found: LoadedRecipe, told: Mapping[str, Any], recipe: Recipe, processes: Processes
) -> None:
    if processes.world > 1:
        weights = digest_of_weights(recipe.module())
        about = {"code": digest_of_code(), "recipe": found.digest, "initial weights": weights} | told
        about |= {name: record[name] for name in ("numbers", "options")}
        check_alike(processes, packages() | about)


def _open_data(recipe: Recipe) -> tuple[list[Mixture], list[Units | None]]:
    """The training and held-out units of every stage."""
    data = [open_sources(stage) for stage in recipe.stages]
    for number, stage in enumerate(recipe.stages):
        try:
            data[number].check(stage.batch)
        except TooFewSamplesError as e:
            raise TooFewSamplesError(f"stage {number}: {e}" if number else str(e)) from None
        if stage.carry.data and (was := data[number - 1].describe()) != (now := data[number].describe()):
            raise RunError(
                f"stage {number} cannot carry on in the data of stage {number - 1}: {was['units']} units of "
                f"{was['samples']} samples there, {now['units']} of {now['samples']} here; their readers must cut alike"
            )
    valid = [
        open_units(stage, stage.valid, stage.valid_sidecar, what="valid") if stage.valid else None
        for stage in recipe.stages
    ]
    return data, valid


def open_sources(stage: Stage) -> Mixture:
    found = sources(stage.data, stage.sidecar)
    units = {name: open_units(stage, source.data, source.sidecar) for name, source in found.items()}
    return Mixture(units, [source.weight for source in found.values()])


def _train_stages(
    out: Path, record: Mapping[str, Any], recipe: Recipe, data: Sequence[Mixture], valid: Sequence[Units | None],
    options: RunOptions, processes: Processes, fresh: bool,
) -> None:  # fmt: skip
    """Restore the newest checkpoint and train from there to the end, or to a signal."""
    module = recipe.module().to(processes.device)
    ledger = Ledger(out / "ledger.jsonl", limit=options.max_holes)
    saved = None if fresh else checkpoint.latest(out / "checkpoints")
    signs = Signs(out, processes.rank, processes.world) if processes.world > 1 else None
    if signs and processes.rank == 0:
        signs.sweep()
    check_alike(processes, {"newest checkpoint": saved and saved.path.name})
    number, step, more = 0, 0, {}
    if saved:
        saved.needs({"model", "optimizer"}, STATE)
        checkpoint.restore_model(module, saved.tensors["model"], strict=True)
        number, step = saved.state["stage"], saved.state["step"]
        more = {name: saved.state[name] for name in ("best", "skipped", "skipped_in_a_row", "held_out_due", "guard")}
        ledger.load_state(saved.state["ledger"])
    metrics = MetricsWriter(out / "metrics.jsonl") if processes.rank == 0 else None
    first, told = global_step(recipe, number, step), metrics.written() if metrics and options.loggers else set()
    if metrics:
        checkpoint.sweep(out / "checkpoints")
        held_out = not more.get("held_out_due", False)
        metrics.truncate_after(first - 1, held_out=held_out)
        ledger.truncate_after(first - 1)
    if number >= len(recipe.stages):
        if metrics:
            print(f"{out} is finished: nothing left to train")
        return
    if metrics and not fresh:
        restart(out, step=first, processes=processes)
    with (
        closing(Loggers(options.loggers if metrics else (), out, record, first=first, told=told)) as loggers,
        Stopper(among=processes.world > 1) as stopper,
        Watchdog(options.hang_seconds, out, processes.rank, signs) as watchdog,
        Progress(sum(stage.steps for stage in recipe.stages), out, quiet=processes.rank > 0) as progress,
    ):
        if metrics:
            metrics.also = loggers
        session = Session(
            checkpoints=out / "checkpoints", options=options, recipe=recipe, module=module, root=Root(module),
            processes=processes,
            ledger=ledger, metrics=metrics, progress=progress, stopper=stopper, watchdog=watchdog, step=first, **more,
        )  # fmt: skip
        moments = (saved.tensors["optimizer"], saved.state["optimizer"]) if saved else None
        for stage in range(number, len(recipe.stages)):
            leg = Leg(session, stage, data[stage], valid[stage])
            begun = step if stage == number else 0
            leg.take_up(begun, moments)
            saved = moments = None  # as large as what is trained, and no longer needed
            finished = leg.train(begun)
            if not finished:
                break
            moments = checkpoint.flatten_optimizer(leg.optimizer, module)
        if metrics:
            progress.say(conclude(out, ledger, step=session.step, finished=finished, skipped=session.skipped))
        if not finished:
            progress.say(f"stopped and saved; go on with: mmpre resume {out}")


def open_units(stage: Stage, urls: Sequence[str], sidecar: str | None, *, what: str = "data") -> Units:
    """The units of some shards, cut as a stage's readers want them."""
    if not urls:
        raise RunError(f"no shards: give the recipe's `{what}` (on the command line: --{what} SHARD ...)")
    shards = open_shards(urls)
    readers = [reader for task in stage.tasks for reader in task.readers]
    sidecars = [Sidecar(Path(sidecar), shards)] if sidecar else []
    return measure(Units(ShardReader(shards), sidecars), readers, shards.cache)
