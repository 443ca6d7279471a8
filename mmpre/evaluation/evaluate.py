"""`mmpre eval`: what a run has learned, on held-out data, beside the same network untrained and beside no network."""

import json
import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mmpre.aside import file_aside
from mmpre.data.loader import MicroBatches, valid_slots
from mmpre.data.mixture import sources
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
from mmpre.runs.command import again
from mmpre.runs.run import Run, RunError, load, open_units
from mmpre.strict_json import read as read_json
from mmpre.training.loop import Context, held_out

log = logging.getLogger(__name__)
KEPT = "evaluation.json"  # in a run's folder: what was measured last, for each data


def evaluate(
    run: Path | str, *, data: Sequence[str] = (), sidecar: str | None = None, best: bool = False,
    untrained: bool = True, bags: bool = True, rows: int = 2048, sets: Sequence[Path | str] = (),
    kinds: Sequence[str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Held-out losses of every task, the recipe's own evaluations, and the tasks of data sets' cards.

    `data` defaults to the run's held-out shards, `sets` (folders with a card) to the set that the run's shards lie in,
    where no data is given; of their tasks those of some `kinds` are measured, or all. Beside it are measured, unless
    left out, the `untrained` network, and by `bags` of pieces what needs no network. Returns {"run", "step", "data",
    "trained": {...}, "untrained": {...}, "trivial": {...}}, each with "tasks" (loss and metrics by task) and "results"
    (name, value, interval, n, chance); "gain" says by how much trained is better than untrained on the same rows, "not
    measured" why a task is missing. Kept in the run's folder as evaluation.json.
    """
    opened, begun = load(run, best=best), time.perf_counter()
    stage = opened.recipe.stages[-1]
    urls = tuple(data) or tuple(stage.valid)
    cards = _cards(stage, data, sets)
    if not urls and not cards:
        raise RunError(f"{run} has no held-out shards of its own; name some with --data")
    sidecar = sidecar if data else stage.valid_sidecar
    answer: dict[str, Any] = {
        "run": str(run), "recipe": opened.record["recipe"]["name"], "step": opened.checkpoint.step, "data": list(urls),
        "sets": [str(folder) for folder in cards], "seed": opened.record["options"]["seed"],
        "kinds": None if kinds is None else list(kinds), "numbers": dict(opened.record["numbers"]),
        "protocol": protocol(),
    }  # fmt: skip
    networks = {"trained": opened.recipe} | ({"untrained": opened.untrained()} if untrained else {})
    tasks = [task for folder in cards for task in card_tasks(folder) if kinds is None or task.kind in kinds]
    if (kinds or (sets and kinds is None)) and not tasks:
        wanted = f"task of kind {' or '.join(kinds)}" if kinds else "task"
        raise RunError(f"{run}: no {wanted} on the cards of {', '.join(map(str, cards))}; add some, or name other sets")
    found: dict[str, dict[str, Result]] = {}
    for name, recipe in networks.items():
        answer[name] = measure_recipe(opened, recipe, urls, sidecar, rows) if urls else {"tasks": {}, "rows": 0}
        results = [*answer[name].pop("results", []), *_measure_cards(tasks, recipe, answer)]
        found[name] = {one.name: one for one in results}
        answer[name]["results"] = [one.as_json() for one in results]
    if tasks and bags:
        subject = Subject(opened.untrained())
        answer["trivial"] = {"results": [one.as_json() for task in tasks for one in trivial(task, subject)]}
    if untrained:
        gains = {name: gain(one, found["untrained"][name]) for name, one in found["trained"].items()}
        answer["gain"] = {name: one for name, one in gains.items() if one is not None}
    answer["known"] = {title(task): task.baseline for task in tasks if task.baseline}
    answer |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": time.perf_counter() - begun}
    keep(Path(run), answer)
    return answer


def measure_recipe(opened: Run, recipe: Recipe, urls: Sequence[str], sidecar: str | None, rows: int) -> dict[str, Any]:
    """Held-out losses and evaluations of one network."""
    processes = Processes.start()
    stage = recipe.stages[-1]
    module = recipe.module().to(processes.device).eval()
    units = open_units(stage, urls, sidecar)
    tasks = {task.name: task for task in stage.tasks}
    seed, number = opened.record["options"]["seed"], len(recipe.stages) - 1
    rows = min(rows, len(units))
    source = MicroBatches.of(stage, units, seed=seed, number=number, held_out=True)
    batches = (source[slot] for slot in valid_slots(stage, rows))
    context = Context(seed, number, processes)
    answer = {"tasks": held_out(batches, tasks, context), "rows": rows}
    results: list[Result] = [result for one in recipe.evaluations for result in one.run(units, processes)]
    module.train()
    return answer | {"results": results}


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
    others = [one for one in kept(run) if any(one.get(key) != answer.get(key) for key in about)]
    with file_aside(run / KEPT) as aside:
        aside.write_text(json.dumps([*others, answer], indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


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


def _measure_cards(tasks: Sequence[CardTask], recipe: Recipe, answer: dict[str, Any]) -> list[Result]:
    device = Processes.device_here()
    recipe.module().to(device).eval()
    subject, results = Subject(recipe), []
    for task in tasks:
        try:
            results += measure(task, subject)
        except NotMeasured as e:
            answer.setdefault("not measured", {})[title(task)] = str(e)
    for member in dict.fromkeys((task.folder, task.input) for task in tasks):
        task = next(task for task in tasks if (task.folder, task.input) == member)
        with suppress(NotMeasured):  # where no sample can be read, which its tasks have told
            results += spread_of(task, subject)
    return results


def table(heading: str, answer: Mapping[str, Any]) -> Table:
    """Trained beside untrained, each with its 95 percent interval, what needs no network, and what guessing gives."""
    shown = Table(title=heading, title_justify="left")
    for column in ("measure", "trained", "untrained", "bag of pieces", "chance"):
        shown.add_column(column, justify="left" if column == "measure" else "right")
    before = {one["name"]: one for one in answer.get("untrained", {}).get("results", ())}
    bags = {one["name"]: one for one in answer.get("trivial", {}).get("results", ())}
    for one in answer["trained"]["results"]:
        chance = "" if one["chance"] is None else f"{one['chance']:.3f}"
        others = (_interval(found.get(one["name"])) for found in (before, bags))
        shown.add_row(one["name"], _interval(one), *others, chance)
    for task, values in answer["trained"]["tasks"].items():
        for name, value in values.items():
            if name != "loss":
                untrained = answer.get("untrained", {}).get("tasks", {}).get(task, {}).get(name)
                shown.add_row(f"{task}: {name}", f"{value:.3f}", "" if untrained is None else f"{untrained:.3f}")
    return shown


def page(runs: Sequence[Path]) -> str:
    """For a page in Markdown: how each run was made, and what was measured of it, as its folder says."""
    return "\n\n".join(_made(run) + "\n" + markdown(kept(run)) for run in runs)


def _made(run: Path) -> str:
    opened = load(run)
    record, outcome = opened.record, opened.record.get("outcome", {})
    environment = record.get("environment", {})
    told = [f"seed {record['options']['seed']}", f"commit {str(environment.get('commit', 'unknown'))[:7]}"]
    told += [f"{environment[name]} {name}" for name in ("threads", "processes") if name in environment]
    told += [f"torch {environment.get('torch')}", f"started {record['started']}"]
    if "at" in outcome:
        took = datetime.fromisoformat(outcome["at"]) - datetime.fromisoformat(record["started"])
        told.append(f"{outcome['step']:,} steps in {took.total_seconds() / 60:.1f} minutes, starting included")
    return f"```\n{again(record, opened.found)}\n```\n\n{', '.join(told)}.\n"


def markdown(answers: Sequence[Mapping[str, Any]]) -> str:
    """Results of some evaluations as a table; nothing is rounded but for showing it."""
    lines = ["| measure | n | trained | untrained | better by | bag of pieces | chance |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for answer in answers:
        others = [{one["name"]: one for one in answer.get(what, {}).get("results", ())}
                  for what in ("untrained", "trivial")]  # fmt: skip
        for one in answer["trained"]["results"]:
            name, gained = one["name"], answer.get("gain", {}).get(one["name"])
            chance = "" if one["chance"] is None else f"{one['chance']:.3f}"
            cells = [name, str(one["n"]), _interval(one), _interval(others[0].get(name)), _interval(gained),
                     _interval(others[1].get(name)), chance]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _interval(one: Mapping[str, Any] | None) -> str:
    return "" if one is None else f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})"
