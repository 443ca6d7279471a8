"""metrics.jsonl as charts: losses by task, learning rate, gradient norm, mask rates, throughput."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmpre.report.account import Account
from mmpre.report.chart import Chart, Mark, Series, series

PLAIN = ("step", "task", "loss", "norm", "lr", "tokens", "rows", "picked", "skipped", "cause", "keys", "time")
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Charts that belong together."""

    title: str
    charts: Sequence[Chart]


def groups(runs: Sequence[Account]) -> list[Group]:
    """All charts of some runs, those of one task together; several runs lie over each other."""
    tasks = dict.fromkeys(line["task"] for run in runs for line in run.steps)
    made = [Group(task, _task(runs, task)) for task in tasks]
    if len(tasks) > 1:
        about = "mean of the tasks' losses, by their shares of the steps"
        made.insert(
            0, Group("all tasks", _charts(runs, [("held-out loss", about, None, lambda line: line["valid_loss"])]))
        )
    made.append(Group("how it went", _course(runs)))
    return [group for group in made if group.charts]


def _task(runs: Sequence[Account], task: str) -> list[Chart]:
    steps = [line for run in runs for line in run.steps if line["task"] == task]
    names = dict.fromkeys(name for line in steps for name in line if name not in PLAIN)
    names = [n for n in names if any(line.get(n) != line["loss"] for line in steps)]  # a single term is the loss
    wanted = [("loss", "", "loss")] + [(name, "", name) for name in names]
    return _charts(
        runs,
        [
            (title, about, _of(task, lambda line, n=name: line.get(n)), _held_out(task, name))
            for title, about, name in wanted
        ],
    )


def _course(runs: Sequence[Account]) -> list[Chart]:
    picks = dict.fromkeys(name for run in runs for line in run.steps for name in line.get("picked", ()))
    wanted = [
        ("learning rate", "", lambda line: line["lr"], None),
        ("gradient norm", "before clipping", lambda line: line["norm"], None),
    ]
    shares = [
        (f"{name} picked", "share of the tokens a mask chose from", lambda line, n=name: line["picked"].get(n), None)
        for name in picks
    ]
    made = _charts(runs, wanted, log=("gradient norm",)) + _charts(runs, shares, loggable=False)
    speed, waited = [], []
    for number, run in enumerate(runs):
        rates = list(_rates(run.steps))
        speed.append(series(run.label or "tokens per second", [(x, tokens) for x, tokens, _ in rates], colour=number))
        waited.append(series(run.label or "waiting", [(x, share) for x, _, share in rates], colour=number))
    marks = _marks(runs)
    made += _full("throughput", "tokens per second, all processes", speed, marks, loggable=False)
    return made + _full("waiting for data", "share of the time", waited, marks, loggable=False)


def _charts(
    runs: Sequence[Account], wanted: Iterable[tuple], *, log: Sequence[str] = (), loggable: bool = True
) -> list[Chart]:
    made, marks = [], _marks(runs)
    for title, about, of_step, of_valid in wanted:
        found: list[Series | None] = []
        for number, run in enumerate(runs):
            trained, held_out = _named(run)
            colour = number if len(runs) > 1 else 0
            if of_step:
                found.append(series(trained, _points(run.steps, of_step), colour=colour))
            if of_valid:
                # one run has a colour to spare for what is held out
                other = colour if len(runs) > 1 else 1
                found.append(series(held_out, _points(run.valid, of_valid), colour=other, dots=True))
        made += _full(title, about, found, marks, log=title in log, loggable=loggable)
    return made


def _full(
    title: str, about: str, found: Iterable[Series | None], marks: Sequence[Mark], log: bool = False,
    loggable: bool = True,
) -> list[Chart]:  # fmt: skip
    """The chart of what there is, as a list: none where there is nothing."""
    kept = [one for one in found if one is not None]
    return [Chart(title, about, kept, marks, log, loggable)] if kept else []


def _named(run: Account) -> tuple[str, str]:
    return (run.label, f"{run.label}, held out") if run.label else ("training", "held out")


def _points(lines: Sequence[Line], value: Callable[[Line], Any]) -> list[tuple[float, float]]:
    found = [(line["step"], value(line)) for line in lines]
    return [(float(x), float(y)) for x, y in found if y is not None]


def _of(task: str, value: Callable[[Line], Any]) -> Callable[[Line], Any]:
    return lambda line: value(line) if line["task"] == task else None


def _held_out(task: str, name: str) -> Callable[[Line], Any]:
    return lambda line: line["valid"].get(task, {}).get(name)


def _rates(steps: Sequence[Line]) -> Iterable[tuple[float, float, float]]:
    """Between logged steps: tokens per second and the share of the time spent waiting for data.

    A line counts from the start of its session, so differences are taken, and a session's first line stands alone.
    """
    before = (0.0, 0.0, 0.0)
    for line in steps:
        time = line.get("time")
        if not time:
            continue
        now = time["seconds"], time["tokens_per_second"] * time["seconds"], time["waited"]
        if now[0] < before[0]:
            before = (0.0, 0.0, 0.0)
        seconds, tokens, waited = (a - b for a, b in zip(now, before, strict=True))
        if seconds > 0:
            yield line["step"], max(tokens, 0.0) / seconds, min(max(waited, 0.0) / seconds, 1.0)
        before = now


def _marks(runs: Sequence[Account]) -> list[Mark]:
    return [mark for run in runs for mark in run.marks]
