"""`mmpre eval`: what a run has learned, on held-out data, beside the same network untrained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mmpre.data.loader import MicroBatches, valid_slots
from mmpre.evaluation.results import Result
from mmpre.loop import Context, held_out
from mmpre.processes import Processes
from mmpre.recipe import Recipe
from mmpre.run import Run, RunError, load, open_units


def evaluate(
    run: Path | str, *, data: Sequence[str] = (), sidecar: str | None = None, best: bool = False,
    untrained: bool = True, rows: int = 2048,
) -> dict[str, Any]:  # fmt: skip
    """Held-out losses of every task and the recipe's own evaluations, trained and (by default) untrained.

    `data` defaults to the run's held-out shards. Returns {"run", "step", "data", "trained": {...}, "untrained": {...}},
    each with "tasks" (loss and metrics by task) and "results" (name, value, interval, n, chance).
    """
    opened = load(run, best=best)
    stage = opened.recipe.stages[-1]
    urls = tuple(data) or tuple(stage.valid)
    if not urls:
        raise RunError(f"{run} has no held-out shards of its own; name some with --data")
    sidecar = sidecar if data else stage.valid_sidecar
    answer: dict[str, Any] = {
        "run": str(run), "recipe": opened.record["recipe"]["name"], "step": opened.checkpoint.step, "data": list(urls),
        "seed": opened.record["options"]["seed"],
    }  # fmt: skip
    networks = {"trained": opened.recipe} | ({"untrained": opened.untrained()} if untrained else {})
    for name, recipe in networks.items():
        answer[name] = measure_recipe(opened, recipe, urls, sidecar, rows)
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
    return answer | {"results": [result.as_json() for result in results]}


def table(title: str, answer: Mapping[str, Any]) -> Table:
    """Trained beside untrained, each with its 95 percent interval, and what guessing gives."""
    shown = Table(title=title, title_justify="left")
    for column in ("measure", "trained", "untrained", "chance"):
        shown.add_column(column, justify="left" if column == "measure" else "right")
    before = {one["name"]: one for one in answer["untrained"]["results"]}
    for one in answer["trained"]["results"]:
        chance = "" if one["chance"] is None else f"{one['chance']:.3f}"
        shown.add_row(one["name"], _interval(one), _interval(before[one["name"]]), chance)
    for task, values in answer["trained"]["tasks"].items():
        for name, value in values.items():
            if name != "loss":
                shown.add_row(f"{task}: {name}", f"{value:.3f}", f"{answer['untrained']['tasks'][task][name]:.3f}", "")
    return shown


def _interval(one: Mapping[str, Any]) -> str:
    return f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})"
