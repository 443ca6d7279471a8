"""`mmpre claim`: a paper's comparison, made again: its own way beside others, over seeds, with a verdict by a rule.

Each arm with each seed is a run in a folder of its own. What is finished is not done again, what was killed goes on; so
the same command takes up where it was.
"""
# S seeds

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy.stats import t as student

from mmpre.aside import file_aside
from mmpre.claims import OWN, Claim
from mmpre.evaluate import evaluate, kept
from mmpre.options import RunOptions
from mmpre.plan import plan
from mmpre.plugins import find_recipe
from mmpre.record import read_record
from mmpre.record_check import differences
from mmpre.run import RunError, load, resume, train

log = logging.getLogger(__name__)
RULE = "of the paired differences over seeds, the 95 percent interval by Student's t: above 0 is reproduced, 0 within "
RULE += "it is undecided, else it is not reproduced"


@dataclass(frozen=True, kw_only=True)
class ClaimOptions:
    """How a claim is looked into."""

    seeds: int = 3  # runs of each arm
    quick: bool = False  # by the claim's few steps, for a first look
    on: tuple[Path, ...] = ()  # folders of data sets whose cards' tasks are measured; by default the data's own
    threads: int = 1  # of a run's arithmetic
    json: bool = False  # print JSON for programs

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"claim: wanted at least 2 seeds, got {self.seeds}; one difference has no interval")


def claim(
    recipe: str | Path, out: Path | str, *, scale: str = "tiny", options: ClaimOptions | None = None, **numbers: Any
) -> dict[str, Any]:
    """Train and measure all arms, and say of each comparison what was seen. Kept as claim.json in `out`.

    `numbers` override the recipe's for all arms, such as data. Raises ValueError for a recipe without a claim, for a
    folder that holds other runs, and for a measure that no evaluation gives.
    """
    found, out, options = find_recipe(recipe), Path(out), options or ClaimOptions()
    stated: Claim | None = found.claim
    if stated is None:
        raise ValueError(f"claim: recipe {found.name} states none; put `claim = Claim(...)` into its file")
    shared = {**(stated.quick if options.quick else stated.numbers), **numbers}
    arms = {OWN: dict(shared)} | {name: {**shared, **one.numbers} for name, one in stated.against.items()}
    flops = {name: _flops(recipe, scale, some) for name, some in arms.items()}
    steps = {name: found.numbers(scale, some)["steps"] for name, some in arms.items()}
    if stated.equal == "flops":
        for name in stated.against:
            steps[name] = max(1, round(steps[OWN] * flops[OWN] / flops[name]))
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for seed in range(options.seeds):
        for name, some in arms.items():
            folder = out / f"{name.replace(' ', '-')}-{seed}"
            wanted, how = {**some, "steps": steps[name]}, RunOptions(seed=seed, threads=options.threads)
            if not (folder / "run.json").exists():
                train(recipe, scale=scale, out=folder, options=how, **wanted)
            elif other := differences(read_record(folder), found, found.numbers(scale, wanted), how):
                raise ValueError(f"claim: {folder} was made in another way: {other}; give another --out")
            elif _step(folder) < steps[name]:
                resume(folder)
            if (step := _step(folder)) < steps[name]:
                raise RunError(f"claim: {folder} was stopped at step {step} of {steps[name]}; do the same again")
            answers[name].append(_measured(folder, options.on))
    compared = {}
    for name, one in stated.against.items():
        own_S, other_S = (np.array([_value(a, one.measure) for a in answers[arm]]) for arm in (OWN, name))
        compared[name] = {"measure": one.measure, "less": one.less, **compare(own_S, other_S, less=one.less)}
    told = {
        "recipe": found.name, "scale": scale, "says": stated.says, "equal": stated.equal, "rule": RULE,
        "seeds": options.seeds, "quick": options.quick,
        "arms": {
            name: {"steps": steps[name], "flops of a step": flops[name], "flops": flops[name] * steps[name]}
            for name in arms
        },
        "compared": compared,
    }  # fmt: skip
    with file_aside(out / "claim.json") as aside:
        aside.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return told


def compare(own_S: np.ndarray, other_S: np.ndarray, *, less: bool = False) -> dict[str, Any]:
    """Both arms' values over seeds, the mean difference in favour of the first with its interval, and the verdict."""
    better_S = (other_S - own_S) if less else (own_S - other_S)
    middle, count = float(better_S.mean()), len(better_S)
    reach = float(student.ppf(0.975, count - 1) * better_S.std(ddof=1) / math.sqrt(count))
    low, high = middle - reach, middle + reach
    verdict = "reproduced" if low > 0 else "undecided" if high >= 0 else "not reproduced"
    return {
        "own": own_S.tolist(), "other": other_S.tolist(), "better by": middle, "low": low, "high": high,
        "verdict": verdict,
    }  # fmt: skip


def table(told: Mapping[str, Any]) -> Table:
    """Each comparison in a row: means and spread over seeds, the difference, and the verdict."""
    shown = Table(title=f"{told['recipe']}: {told['says']} ({told['seeds']} seeds, equal {told['equal']})",
                  title_justify="left", caption=f"The interval is {told['rule']}.", caption_justify="left")  # fmt: skip
    for column in ("against", "measure", "own", "other", "better by", "steps", "FLOPs", "verdict"):
        shown.add_column(column)
    for name, one in told["compared"].items():
        arms = [told["arms"][arm] for arm in (OWN, name)]
        shown.add_row(
            name, one["measure"], _spread(one["own"]), _spread(one["other"]),
            f"{one['better by']:.4f} ({one['low']:.4f} to {one['high']:.4f})",
            " / ".join(f"{arm['steps']:,}" for arm in arms), " / ".join(f"{arm['flops']:.3g}" for arm in arms),
            one["verdict"],
        )  # fmt: skip
    return shown


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def _flops(recipe: str | Path, scale: str, numbers: Mapping[str, Any]) -> float:
    """FLOPs of a step, the mean over stages by their steps."""
    stages = plan(recipe, scale=scale, **numbers)["stages"]
    return sum(one["flops"] * one["steps"] for one in stages) / sum(one["steps"] for one in stages)


def _step(folder: Path) -> int:
    """At which step work on a run ended."""
    return read_record(folder).get("outcome", {}).get("step", 0)


def _measured(folder: Path, sets: Sequence[Path | str]) -> dict[str, Any]:
    step, names = load(folder).checkpoint.step, [str(one) for one in sets]
    for answer in kept(folder):
        if answer["step"] == step and (not names or answer["sets"] == names):
            return answer
    return evaluate(folder, untrained=False, sets=sets)


def _value(answer: Mapping[str, Any], measure: str) -> float:
    for task, values in answer["trained"]["tasks"].items():
        for name, value in values.items():
            if measure == f"{task}: {name}":
                return value
    found = [one["value"] for one in answer["trained"]["results"] if measure in one["name"]]
    if not found:
        known = [f"{task}: {name}" for task, values in answer["trained"]["tasks"].items() for name in values]
        known += [one["name"] for one in answer["trained"]["results"]]
        raise ValueError(f"claim: no result has {measure!r} in its name; there are {'; '.join(known)}")
    return float(np.mean(found))
