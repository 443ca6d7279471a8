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
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmpre import checkpoint
from mmpre.data.index import open_shards
from mmpre.data.ledger import Ledger
from mmpre.data.loader import check_world
from mmpre.data.shards import ShardReader, Sidecar
from mmpre.data.units import Units, describe, measure
from mmpre.draw import hashed
from mmpre.leg import Leg, Session, global_step
from mmpre.lock import RunLock
from mmpre.metrics import MetricsWriter
from mmpre.options import RunOptions
from mmpre.plugins import LoadedRecipe, find_recipe
from mmpre.processes import Processes
from mmpre.progress import Progress
from mmpre.recipe import Recipe, Stage
from mmpre.stopping import Stopper, Watchdog, die_with_parent
from mmpre.strict_json import read as read_json

log = logging.getLogger(__name__)
FORMAT = 1


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
    return _carry_out(out, record, found, options, fresh=True)


def resume(run: Path | str, **changes: Any) -> Path:
    """Continue a run from its newest valid checkpoint; a finished run says so and returns.

    `changes` may be any RunOptions that do not change results (workers, save_every ...), and `data`, `valid`,
    `sidecar` and `valid_sidecar` where the same shards have moved.
    """
    run = Path(run)
    record = _read_record(run)
    results = {"seed", "precision", "exact"} | ({"threads"} if record["options"]["exact"] else set())
    fixed = results & {k for k, v in changes.items() if v != record["options"].get(k)}
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
    return _carry_out(run, record, _find_again(run, record), RunOptions(**record["options"]), fresh=False)


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
        return checkpoint.of_run(self.path, best=self.best)

    def untrained(self) -> Recipe:
        """The recipe with the weights that it draws before anything is put in their place."""
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


def _carry_out(out: Path, record: dict[str, Any], found: LoadedRecipe, options: RunOptions, *, fresh: bool) -> Path:
    """Train what is left of a run, alone on its folder."""
    threads = torch.get_num_threads()
    if options.arithmetic_threads:
        torch.set_num_threads(options.arithmetic_threads)
    processes = Processes.start()
    if processes.world > 1:
        die_with_parent()
    try:
        recipe = _build(found, record["numbers"], options.seed)
        for stage in recipe.stages:
            check_world(stage.micro_batches, processes.world)
        if processes.rank == 0:
            out.mkdir(parents=True, exist_ok=True)
        processes.barrier()
        with RunLock(out) if processes.rank == 0 else nullcontext():
            data, valid = _open_data(recipe)
            _check_record(out, record, found, [describe(units) for units in data], processes, fresh)
            _train_stages(out, recipe, data, valid, options, processes, fresh)
    finally:
        processes.stop()
        torch.set_num_threads(threads)
    return out


def _open_data(recipe: Recipe) -> tuple[list[Units], list[Units | None]]:
    """The training and held-out units of every stage."""
    data = [open_units(stage, stage.data, stage.sidecar) for stage in recipe.stages]
    for number, stage in enumerate(recipe.stages):
        if stage.carry.data and (was := describe(data[number - 1])) != (now := describe(data[number])):
            raise RunError(
                f"stage {number} cannot carry on in the data of stage {number - 1}: {was['units']} units of "
                f"{was['samples']} samples there, {now['units']} of {now['samples']} here; their readers must cut alike"
            )
    valid = [
        open_units(stage, stage.valid, stage.valid_sidecar, what="valid") if stage.valid else None
        for stage in recipe.stages
    ]
    return data, valid


def _check_record(
    out: Path, record: dict[str, Any], found: LoadedRecipe, fingerprints: list[Mapping[str, Any]],
    processes: Processes, fresh: bool,
) -> None:  # fmt: skip
    """Write down what a new run begins with; refuse to continue one on other data."""
    if not fresh:
        for number, (was, now) in enumerate(zip(record["data"], fingerprints, strict=True)):
            if was["fingerprint"] != now["fingerprint"]:
                raise RunError(
                    f"the data of stage {number} is not what {out} was trained on: {was['samples']} samples "
                    f"(fingerprint {was['fingerprint'][:12]}) then, {now['samples']} ({now['fingerprint'][:12]}) now. "
                    "Shards may move, but must be the same, in the same order; start a new run for other data"
                )
    elif processes.rank == 0:
        record = record | {"data": fingerprints, "environment": _environment(processes)}
        if found.is_file:
            (out / "recipe.py").write_bytes(found.path.read_bytes())
        aside = out / ".run.json"
        aside.write_text(json.dumps(record, indent=2) + "\n")
        os.replace(aside, out / "run.json")


def _train_stages(
    out: Path, recipe: Recipe, data: Sequence[Units], valid: Sequence[Units | None], options: RunOptions,
    processes: Processes, fresh: bool,
) -> None:  # fmt: skip
    """Restore the newest checkpoint and train from there to the end, or to a signal."""
    module = recipe.module().to(processes.device)
    ledger = Ledger(out / "ledger.jsonl", limit=options.max_holes)
    saved = None if fresh else checkpoint.latest(out / "checkpoints")
    number, step, more = 0, 0, {}
    if saved:
        checkpoint.restore_model(module, saved.tensors["model"], strict=True)
        number, step = saved.state["stage"], saved.state["step"]
        more = {name: saved.state[name] for name in ("best", "skipped_in_a_row")}
        ledger.load_state(saved.state["ledger"])
    metrics = MetricsWriter(out / "metrics.jsonl") if processes.rank == 0 else None
    if metrics:
        checkpoint.sweep(out / "checkpoints")
        metrics.truncate_after(global_step(recipe, number, step) - 1)
        ledger.truncate_after(global_step(recipe, number, step) - 1)
    if number >= len(recipe.stages):
        print(f"{out} is finished: nothing left to train")
        return
    with (
        Stopper() as stopper,
        Watchdog(options.hang_seconds, out, processes.rank) as watchdog,
        Progress(sum(stage.steps for stage in recipe.stages), out, quiet=processes.rank > 0) as progress,
    ):
        session = Session(
            checkpoints=out / "checkpoints", options=options, recipe=recipe, module=module, processes=processes,
            ledger=ledger, metrics=metrics, progress=progress, stopper=stopper, watchdog=watchdog, **more,
        )  # fmt: skip
        moments = (saved.tensors["optimizer"], saved.state["optimizer"]) if saved else None
        for stage in range(number, len(recipe.stages)):
            leg = Leg(session, stage, data[stage], valid[stage])
            if not leg.train(step if stage == number else 0, moments):
                progress.say(f"stopped and saved; go on with: mmpre resume {out}")
                return
            moments = checkpoint.flatten_optimizer(leg.optimizer, module)
        progress.say(ledger.summary())


def open_units(stage: Stage, urls: Sequence[str], sidecar: str | None, *, what: str = "data") -> Units:
    """The units of some shards, cut as a stage's readers want them."""
    if not urls:
        raise RunError(f"no shards: give the recipe's `{what}` (on the command line: --{what} SHARD ...)")
    shards = open_shards(urls)
    readers = [reader for task in stage.tasks for reader in task.objective.readers.values()]
    sidecars = [Sidecar(Path(sidecar), shards)] if sidecar else []
    return measure(Units(ShardReader(shards), sidecars), readers, shards.cache)


def _environment(processes: Processes) -> dict[str, Any]:
    packages = {name: version(name) for name in ("mmpre", "torch", "numpy", "tokenizers", "safetensors")}
    return {
        "python": sys.version.split()[0], "machine": platform.platform(), "processes": processes.world,
        "device": str(processes.device), "threads": torch.get_num_threads(), **packages,
    }  # fmt: skip
