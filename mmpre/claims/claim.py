"""`mmpre claim`: a paper's comparison, made again: its own way beside others, over seeds, with a verdict by a rule.

Each arm with each seed is a run in a folder and a process of its own (one_run.py, runs.py). What is finished is
not done again, what was stopped goes on; so the same command takes up where it was. __init__.py says what a claim is,
page.py how it is told.
"""
# S seeds

import logging
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmpre.claims import OWN, Claim
from mmpre.claims.one_run import ClaimRun
from mmpre.claims.page import write
from mmpre.claims.runs import carry_out
from mmpre.data.remote import public
from mmpre.evaluation.cards import card_beside
from mmpre.evaluation.suite import card_tasks
from mmpre.markdown import student_interval
from mmpre.plan import plan
from mmpre.plugins import LoadedRecipe, find_recipe
from mmpre.runs.command import flag
from mmpre.runs.commit import short
from mmpre.runs.options import RunOptions
from mmpre.runs.record import read_record

log = logging.getLogger(__name__)
RULE = (
    "of the paired differences over seeds, the 95 percent interval by Student's t: above 0 is reproduced, below 0 not "
    "reproduced, else undecided; with a margin, in place of 0 stands the margin below it"
)


@dataclass(frozen=True, kw_only=True)
class ClaimOptions:
    """How a claim is looked into."""

    seeds: int = 3  # runs of each arm
    quick: bool = False  # by the claim's few steps, for a first look
    on: tuple[Path, ...] = ()  # folders of data sets whose cards' tasks are measured; by default the data's own
    at_once: int = 2  # runs, each in a process of its own
    threads: int = 1  # of a run's arithmetic
    out_page: Path | None = None  # where to put what is to be kept as well: NAME for NAME.md, NAME.json, NAME.svg
    json: bool = False  # print JSON for programs

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise ValueError(f"claim: wanted at least 2 seeds, got {self.seeds}; one difference has no interval")
        for name in ("at_once", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"claim: {name} must be at least 1, got {getattr(self, name)}")


class NoResultError(ValueError):
    """No result has what a claim compares by in its name."""


@dataclass(frozen=True)
class Arm:
    """One way to train: what differs from the claim's numbers, all numbers, steps, and FLOPs of a step."""

    recipe: str
    scale: str
    changes: Mapping[str, Any]
    numbers: Mapping[str, Any]
    steps: int
    flops: float


def claim(
    recipe: str | Path, out: Path | str, *, scale: str = "tiny", options: ClaimOptions | None = None, **numbers: Any
) -> dict[str, Any]:
    """Train and measure all arms, and say of each comparison what was seen. Kept as claim.json, .md and .svg in `out`.

    `numbers` override the recipe's for all arms, such as data. A measure that the data at hand does not give is told as
    not measured, with what there was. Raises ValueError for a recipe without a claim, for a folder that holds other
    runs, and where nothing could be measured; RunError that names the runs that failed.
    """
    found, out, options = find_recipe(recipe), Path(out), options or ClaimOptions()
    stated: Claim | None = found.claim
    if stated is None:
        raise ValueError(f"claim: recipe {found.name} states none; put `claim = Claim(...)` into its file")
    if options.on and not stated.kinds:
        raise ValueError(
            f"claim: --on names sets whose tasks are measured, but {found.name}'s claim measures none of them"
        )
    shared = {**(stated.quick if options.quick else stated.numbers), **numbers}
    arms = _arms(found, recipe, scale, stated, shared)
    before = _before(stated, found.numbers(scale, shared), quick=options.quick)
    runs = {
        (name, seed): _run(name, arm, seed, out, options, stated, measured=True)
        for seed in range(options.seeds)
        for name, arm in arms.items()
    }
    first = [_run("before", before, seed, out, options) for seed in range(options.seeds)] if before else []
    for run in (*first, *runs.values()):
        run.check()
    _look_for_tasks(stated, found.numbers(scale, shared), options)
    carry_out([*first, *runs.values()], options.at_once)
    compared, missing = [], {}
    for name, one in stated.against.items():
        for measure in one.measures:
            try:
                own_S, other_S = (
                    np.array([_value(runs[arm, seed].answer, measure.name) for seed in range(options.seeds)])
                    for arm in (OWN, name)
                )
            except NoResultError as error:
                missing[f"{name}: {measure.name}"] = str(error)
                continue
            result = compare(own_S, other_S, less=measure.less, margin=measure.margin)
            about = {"measure": measure.name, "less": measure.less, "margin": measure.margin}
            compared.append({"against": name, **about, **result})
    if not compared:
        raise ValueError("; ".join(missing.values()))
    alike = [arm for arm in arms.values() if "steps" not in arm.changes]
    flops = [arm.flops * arm.steps for arm in alike]
    told = {
        "recipe": found.name, "scale": scale, "says": stated.says, "equal": stated.equal, "rule": RULE,
        "seeds": options.seeds, "quick": options.quick, "numbers": _as_json(shared),
        "same steps": len({arm.steps for arm in alike}) == 1,
        "flops differ by": max(abs(one / flops[0] - 1) for one in flops),
        "before": _told(before, first) if before else None,
        "arms": {
            name: _told(arm, [runs[name, seed] for seed in range(options.seeds)]) for name, arm in arms.items()
        },
        "compared": compared, "not measured": missing, "made": _made([*first, *runs.values()], options)
        | {"command": _command(recipe, out, scale, options, numbers)},
    }  # fmt: skip
    write(told, out, "claim")
    if options.out_page is not None:
        write(told, options.out_page.parent, options.out_page.name)
    return told


def _look_for_tasks(stated: Claim, numbers: Mapping[str, Any], options: ClaimOptions) -> None:
    """Warn, before anything is trained, where no data set at hand has the tasks that a claim measures."""
    beside = card_beside(tuple(numbers.get("data") or ())) or card_beside(tuple(numbers.get("valid") or ()))
    cards = list(options.on) or ([beside] if beside else [])
    kinds = {task.kind for folder in cards for task in card_tasks(Path(folder))}
    if stated.kinds and not kinds & set(stated.kinds):
        log.warning(
            "no task of kind %s on %s: what the claim measures by such will be told as not measured; name a set that "
            "has some by --on", " or ".join(stated.kinds), ", ".join(map(str, cards)) or "a card beside the data",
        )  # fmt: skip


def compare(own_S: np.ndarray, other_S: np.ndarray, *, less: bool = False, margin: float = 0.0) -> dict[str, Any]:
    """Both arms' values over seeds, the mean difference in favour of the first with its interval, and the verdict."""
    better_S = (other_S - own_S) if less else (own_S - other_S)
    middle, low, high = student_interval(better_S)
    verdict = "reproduced" if low > -margin else "undecided" if high >= -margin else "not reproduced"
    return {
        "own": own_S.tolist(), "other": other_S.tolist(), "better by": middle, "low": low, "high": high,
        "verdict": verdict,
    }  # fmt: skip


def _arms(
    found: LoadedRecipe, recipe: str | Path, scale: str, stated: Claim, shared: Mapping[str, Any]
) -> dict[str, Arm]:
    changes = {OWN: {}} | {name: one.numbers for name, one in stated.against.items()}
    numbers = {name: {**shared, **some} for name, some in changes.items()}
    flops = {name: _flops(recipe, scale, some) for name, some in numbers.items()}
    steps = {name: found.numbers(scale, some)["steps"] for name, some in numbers.items()}
    if stated.equal == "flops":
        for name in (name for name, one in stated.against.items() if "steps" not in one.numbers):
            steps[name] = max(1, round(steps[OWN] * flops[OWN] / flops[name]))
    return {
        name: Arm(str(recipe), scale, some, numbers[name] | {"steps": steps[name]}, steps[name], flops[name])
        for name, some in changes.items()
    }


def _before(stated: Claim, numbers: Mapping[str, Any], *, quick: bool) -> Arm | None:
    """What the arms start from, where they do; `numbers` are those of the claim's own recipe."""
    one = stated.before
    if one is None:
        return None
    changes = one.quick if quick else one.numbers
    some = {name: numbers[name] for name in one.shared} | dict(changes)
    steps = find_recipe(one.recipe).numbers(one.scale, some)["steps"]
    return Arm(one.recipe, one.scale, changes, some, steps, _flops(one.recipe, one.scale, some))


def _run(
    name: str, arm: Arm, seed: int, out: Path, options: ClaimOptions, stated: Claim | None = None, *,
    measured: bool = False,
) -> ClaimRun:  # fmt: skip
    numbers, after = dict(arm.numbers), None
    if stated is not None and stated.before is not None:
        after = out / f"before-{seed}"
        if stated.before.number not in arm.changes:  # an arm may start from nothing
            numbers[stated.before.number] = str(after)
    how = RunOptions(seed=seed, threads=options.threads, workers=1, log_every=max(1, min(10, arm.steps // 100)))
    return ClaimRun(
        arm=name, folder=out / f"{name.replace(' ', '-')}-{seed}", recipe=arm.recipe, scale=arm.scale, numbers=numbers,
        steps=arm.steps, flops=arm.flops * arm.steps, options=how,
        sets=[str(one) for one in options.on] if measured else None, kinds=stated.kinds if stated else (), after=after,
    )  # fmt: skip


def _flops(recipe: str | Path, scale: str, numbers: Mapping[str, Any]) -> float:
    """FLOPs of a step, the mean over all."""
    stages = plan(recipe, scale=scale, **numbers)["stages"]
    return sum(one["flops_in_all"] for one in stages) / sum(one["steps"] for one in stages)


def _value(answer: Mapping[str, Any], measure: str) -> float:
    for task, values in answer["trained"]["tasks"].items():
        for name, value in values.items():
            if measure == f"{task}: {name}":
                return value
    whole = re.compile(rf"(?<!\w){re.escape(measure)}(?!\w)")  # R@1 is no part of R@10
    found = [one["value"] for one in answer["trained"]["results"] if whole.search(one["name"])]
    if not found:
        known = [f"{task}: {name}" for task, values in answer["trained"]["tasks"].items() for name in values]
        known += [one["name"] for one in answer["trained"]["results"]]
        left_out = "".join(f"; not measured: {name} ({why})" for name, why in answer.get("not measured", {}).items())
        raise NoResultError(f"claim: no result has {measure!r} in its name; there are {'; '.join(known)}{left_out}")
    return float(np.mean(found))


def _told(arm: Arm, runs: Sequence[ClaimRun]) -> dict[str, Any]:
    return {
        "recipe": arm.recipe if arm.recipe.isidentifier() else Path(arm.recipe).stem, "scale": arm.scale,
        "numbers": _as_json(arm.changes), "steps": arm.steps, "flops of a step": arm.flops,
        "flops": arm.flops * arm.steps, "seconds": [round(run.seconds(), 1) for run in runs],
    }  # fmt: skip


def _made(runs: Sequence[ClaimRun], options: ClaimOptions) -> dict[str, Any]:
    """With what the runs were made, as they say themselves."""
    records = [read_record(run.folder) for run in runs]
    around = [one for record in records for one in (record, *record.get("restarts", []))]
    answers = [run.answer for run in runs if run.answer is not None]
    return {
        "commits": sorted({short(one["environment"].get("commit")) for one in around}),
        "machine": answers[-1]["protocol"]["machine"], "torch": answers[-1]["protocol"]["torch"],
        "at once": options.at_once, "threads": options.threads, "date": max(one["date"] for one in answers),
    }  # fmt: skip


def _command(recipe: str | Path, out: Path, scale: str, options: ClaimOptions, numbers: Mapping[str, Any]) -> str:
    """What makes all of it again."""
    words = ["mmpre", "claim", str(recipe), "--scale", scale]
    given = {**asdict(options), **public(numbers), "out": out}
    usual = asdict(ClaimOptions())
    for name, value in given.items():
        if name == "json" or (name in usual and usual[name] == value):
            continue
        words += flag(name, value)
    return shlex.join(words)


def _as_json(numbers: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in public(numbers).items()}
