"""`mmpre eval`: what a run has learned, on held-out data, beside the same network untrained and beside no network."""

import json
import logging
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from mmpre.aside import file_aside
from mmpre.data.ledger import Hole
from mmpre.data.loader import MicroBatch, MicroBatches, valid_slots
from mmpre.data.mixture import sources
from mmpre.data.remote import public
from mmpre.evaluation.cards import CardTask, card_beside
from mmpre.evaluation.results import RESAMPLES, NotMeasured, Result, gain
from mmpre.evaluation.suite import (
    TEST_ROWS,
    TRAIN_ROWS,
    VALID_ROWS,
    Subject,
    card_tasks,
    measure,
    spread_of,
    title,
    trivial,
)
from mmpre.processes.processes import Processes
from mmpre.recipe import Recipe, Stage
from mmpre.runs.run import Run, RunError, load, open_units
from mmpre.strict_json import JSONError
from mmpre.strict_json import read as read_json
from mmpre.training.loop import Context, held_out

log = logging.getLogger(__name__)
KEPT = "evaluation.json"  # in a run's folder: what was measured last, for each data


def evaluate(
    run: Path | str, *, data: Sequence[str] = (), sidecar: str | None = None, best: bool = False,
    untrained: bool = True, bags: bool = True, rows: int = 2048, sets: Sequence[Path | str] = (),
    kinds: Sequence[str] | None = None, required: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Held-out losses of every task, the recipe's own evaluations, and the tasks of data sets' cards.

    `data` defaults to the run's held-out shards, `sets` (folders with a card) to the set that the run's shards lie in,
    where no data is given; of their tasks those of some `kinds` are measured, or all; there must be one where they are
    `required`. Beside it are measured, unless
    left out, the `untrained` network, and by `bags` of pieces what needs no network. Returns {"run", "step", "data",
    "trained": {...}, "untrained": {...}, "trivial": {...}}, each with "tasks" (loss and metrics by task) and "results"
    (name, value, interval, n, chance); "gain" says by how much trained is better than untrained on the same rows, "not
    measured" why a task or a measure is missing. Kept in the run's folder as evaluation.json.
    """
    opened, begun = load(run, best=best), time.perf_counter()
    stage = opened.recipe.stages[-1]
    urls = tuple(data) or tuple(stage.valid)
    cards = _cards(stage, data, sets)
    if not urls and not cards:
        raise RunError(f"{run} has no held-out shards of its own; name some with --data")
    if sidecar is None and not data:
        sidecar = stage.valid_sidecar
    elif sidecar is None and stage.valid_sidecar:
        log.warning("the run's own shards have a sidecar and --data is given alone; name its sidecar by --sidecar")
    chosen = None if kinds is None else list(kinds)
    answer: dict[str, Any] = {
        "asked": {"data": public(data), "sets": [str(one) for one in sets], "kinds": chosen},
        "run": str(run), "recipe": opened.record["recipe"]["name"], "step": opened.checkpoint.step,
        "data": public(urls), "sets": [str(folder) for folder in cards], "seed": opened.record["options"]["seed"],
        "kinds": chosen, "numbers": dict(opened.record["numbers"]),
        "protocol": protocol(),
    }  # fmt: skip
    networks = {"trained": opened.recipe} | ({"untrained": opened.untrained()} if untrained else {})
    tasks = [task for folder in cards for task in card_tasks(folder) if kinds is None or task.kind in kinds]
    if required and (kinds or (sets and kinds is None)) and not tasks:
        wanted = f"task of kind {' or '.join(kinds)}" if kinds else "task"
        raise RunError(f"{run}: no {wanted} on the cards of {', '.join(map(str, cards))}; add some, or name other sets")
    found: dict[str, dict[str, Result]] = {}
    for name, recipe in networks.items():
        answer[name] = {"tasks": {}, "rows": 0}
        if urls:
            answer[name] = measure_recipe(opened, recipe, urls, sidecar, rows, untrained=name == "untrained")
        missing = answer[name].pop("not measured", {})
        results = [*answer[name].pop("results", []), *_measure_cards(tasks, recipe, missing)]
        results = list(_numbers(results, missing))
        answer.setdefault("not measured", missing)  # the trained network's, which comes first
        found[name] = {one.name: one for one in results}
        answer[name]["results"] = [one.as_json() for one in results]
    if tasks and bags:
        subject = Subject(opened.untrained())
        found_by_bags = _numbers((one for task in tasks for one in trivial(task, subject)), {})
        answer["trivial"] = {"results": [one.as_json() for one in found_by_bags]}
    if untrained:
        both = {name: one for name, one in found["trained"].items() if name in found["untrained"]}
        gains = {name: gain(one, found["untrained"][name]) for name, one in both.items()}
        answer["gain"] = {name: one for name, one in gains.items() if one is not None}
    if not answer["not measured"]:
        del answer["not measured"]
    answer["known"] = {title(task): task.baseline for task in tasks if task.baseline}
    answer |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": time.perf_counter() - begun}
    try:
        keep(Path(run), answer)
    except OSError as e:  # somebody else's run, a full disk
        log.warning("%s: the evaluation cannot be kept (%s); it is here alone", run, e)
    return answer


def measure_recipe(
    opened: Run, recipe: Recipe, urls: Sequence[str], sidecar: str | None, rows: int, *, untrained: bool = False
) -> dict[str, Any]:
    """Held-out losses and evaluations of one network; the rows are those that every task can read."""
    processes = Processes.start()
    stage = recipe.stages[-1]
    module = recipe.module().to(processes.device).eval()
    units = open_units(stage, urls, sidecar)
    tasks = {task.name: task for task in stage.tasks}
    seed, number = opened.record["options"]["seed"], len(recipe.stages) - 1
    rows, holes = min(rows, len(units)), dict[str, list[Hole]]()  # by task
    source = MicroBatches.of(stage, units, seed=seed, number=number, held_out=True)

    def batches() -> Iterator[MicroBatch]:
        for slot in valid_slots(stage, rows):
            made = source[slot]
            holes.setdefault(slot.task, []).extend(made.holes)
            yield made

    context = Context(seed, number, processes)
    told, missing = held_out(batches(), tasks, context), {}
    lost = max(holes.values(), key=len, default=[])
    if lost and not untrained:
        log.warning("%d of %d held-out rows cannot be read, such as %s", len(lost), rows, lost[0].told())
    for task, values in told.items():
        for name in [name for name, value in values.items() if not math.isfinite(value)]:
            missing[f"{task}: {name}"] = f"its value is {values.pop(name)}"
    answer = {"tasks": told, "rows": rows - len(lost)}
    results: list[Result] = []
    for one in recipe.evaluations:
        try:
            results += one.run(units, processes)
        except NotMeasured as e:
            missing[getattr(one, "name", type(one).__name__)] = str(e)
    module.train()
    return answer | {"results": results, "not measured": missing}


def protocol() -> dict[str, Any]:
    """What every number of an evaluation depends on beside the run and the data."""
    return {
        "interval": f"95 percent, percentile bootstrap over test rows, {RESAMPLES} resamples, drawn from the name",
        "choices": "layer, strength and learning rate on valid alone", "rows": [TRAIN_ROWS, VALID_ROWS, TEST_ROWS],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}", "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }  # fmt: skip


def keep(run: Path, answer: Mapping[str, Any]) -> None:
    """Put an evaluation in the run's file, in place of an earlier one of the same step, data, sets and kinds."""
    about = ("step", "data", "sets", "kinds")
    try:
        before = kept(run)
    except JSONError as e:
        log.warning("%s; it is written anew", e)
        before = []
    others = [one for one in before if any(one.get(key) != answer.get(key) for key in about)]
    text = json.dumps([*others, answer], indent=1, ensure_ascii=False, allow_nan=False)
    with file_aside(run / KEPT) as aside:
        aside.write_text(text + "\n", encoding="utf-8")


def kept(run: Path) -> list[dict[str, Any]]:
    """The evaluations in a run's file, the newest last."""
    return read_json(run / KEPT, max_bytes=64 << 20) if (run / KEPT).exists() else []


def _cards(stage: Stage, data: Sequence[str], sets: Sequence[Path | str]) -> list[Path]:
    if sets:
        return [Path(folder) for folder in sets]
    if data:
        return []
    urls = tuple(url for source in sources(stage.data, stage.sidecar).values() for url in source.data)
    beside = card_beside(urls) or card_beside(tuple(stage.valid))
    return [] if beside is None else [beside]


def _numbers(results: Iterable[Result], missing: dict[str, str]) -> Iterator[Result]:
    """Those that are numbers; the others are told as missing. JSON has none that is not finite."""
    for one in results:
        if all(map(math.isfinite, (one.value, one.low, one.high))):
            yield one
        else:
            missing[one.name] = f"its value is {one.value} ({one.low} to {one.high}) over {one.n}"


def _measure_cards(tasks: Sequence[CardTask], recipe: Recipe, missing: dict[str, str]) -> list[Result]:
    device = Processes.device_here()
    recipe.module().to(device).eval()
    subject, results = Subject(recipe), []
    for task in tasks:
        try:
            results += measure(task, subject)
        except NotMeasured as e:
            missing[title(task)] = str(e)
    for member in dict.fromkeys((task.folder, task.input) for task in tasks):
        task = next(task for task in tasks if (task.folder, task.input) == member)
        with suppress(NotMeasured):  # where no sample can be read, which its tasks have told
            results += spread_of(task, subject)
    return results
