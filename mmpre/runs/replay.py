"""Do one step of a run again, from the checkpoint before it: was it the data, the machine, or chance?

Nothing is written. In exact mode every number comes out bit for bit as it was logged.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mmpre.data.loader import MicroBatches, load, slots
from mmpre.processes.processes import Processes
from mmpre.recipe import Recipe
from mmpre.runs import checkpoint
from mmpre.runs.metrics import read_metrics
from mmpre.runs.options import RunOptions
from mmpre.runs.run import RunError, open_sources
from mmpre.runs.run import load as open_run
from mmpre.training.guard import SpikeGuard
from mmpre.training.loop import Context, Step, steps


def replay(run: Path | str, step: int) -> dict[str, Any]:
    """Train, from the newest checkpoint at or before it (or the run's beginning), up to `step` and tell what it did.

    The result holds "from" (the step begun with), "now", "logged" (what metrics.jsonl says, or None), "same" and the
    names of the step's samples. Raises RunError where no checkpoint before the step is left in its stage.
    """
    opened = open_run(run)
    options = RunOptions(**opened.record["options"])
    recipe = opened.untrained()
    number, local = 0, step
    while number < len(recipe.stages) and local >= recipe.stages[number].steps:
        local -= recipe.stages[number].steps
        number += 1
    if step < 0 or number == len(recipe.stages):
        raise RunError(f"{run} has no step {step}; its steps are 0 to {sum(s.steps for s in recipe.stages) - 1}")
    saved = _before(opened.path / "checkpoints", number, local)
    stage = recipe.stages[number]
    if saved is None and (number > 0 or stage.start or options.init or "imported" in opened.record):
        raise RunError(
            f"{run} has no checkpoint at or before step {step} in its stage; the next time, keep more of them (--keep)"
        )
    source = MicroBatches.of(stage, open_sources(stage), seed=options.seed, number=number)
    threads = torch.get_num_threads()
    torch.set_num_threads(options.arithmetic_threads or threads)
    try:
        last = _again(recipe, number, options, saved, source, local)
    finally:
        torch.set_num_threads(threads)
    now = {"loss": last.loss, **last.values, "norm": last.norm, "lr": last.lr}
    lines = [line for line in read_metrics(opened.path / "metrics.jsonl") if line["step"] == step and "loss" in line]
    logged = {name: lines[0].get(name) for name in now} if lines else None
    same = None if logged is None else {n: str(v) for n, v in now.items()} == {n: str(v) for n, v in logged.items()}
    return {
        "from": saved.step if saved else 0, "step": step, "task": last.task, "now": now, "logged": logged,
        "same": same, "cause": last.cause, "holes": [asdict(hole) for hole in last.holes],
        "keys": [source.name(unit) for made in load(source, slots(stage, options.seed, local, local + 1, 0, 1), 0)
                 for unit in made.units],
    }  # fmt: skip


def _again(
    recipe: Recipe, number: int, options: RunOptions, saved: checkpoint.Checkpoint | None, source: MicroBatches,
    step: int,
) -> Step:  # fmt: skip
    """The step of a stage, after all those between it and the checkpoint."""
    stage, module, first = recipe.stages[number], recipe.module(), 0
    recipe.set_trained(number)
    optimizer = stage.optimizer.build((n, p) for n, p in module.named_parameters() if p.requires_grad)
    guard = SpikeGuard(options.spike)
    if saved is not None:
        first = saved.state["step"]
        checkpoint.restore_model(module, saved.tensors["model"])
        checkpoint.restore_optimizer(optimizer, module, saved.tensors["optimizer"], saved.state["optimizer"])
        guard.load_state(saved.state["guard"])
    context = Context(options.seed, number, Processes(), bf16=options.precision == "bf16", exact=options.exact)
    *_, last = steps(
        stage, module, optimizer, load(source, slots(stage, options.seed, first, step + 1, 0, 1), 0), context,
        first=first, last=step + 1, guard=guard, averages=recipe.averages(number), max_skipped=step + 1,
    )  # fmt: skip
    return last


def _before(folder: Path, stage: int, step: int) -> checkpoint.Checkpoint | None:
    """The newest whole checkpoint of a stage at or before a step."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            found = checkpoint.load(path)
        except checkpoint.CheckpointError:
            continue
        if found.state["stage"] == stage and 0 < found.state["step"] <= step:
            return found
    return None
