"""What `mmpre eval` measured, for people: a table of one run, and a page in Markdown of several."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mmpre.evaluation.evaluate import kept
from mmpre.markdown import spread, student_interval
from mmpre.markdown import table as as_table
from mmpre.runs.command import again
from mmpre.runs.metrics import read_metrics, seconds_of
from mmpre.runs.record import read_record
from mmpre.runs.run import Run, load

HEAD = ("measure", "n", "trained", "untrained", "better by", "bag of pieces", "chance")


def table(heading: str, answer: Mapping[str, Any]) -> Table:
    """Trained beside untrained, each with its 95 percent interval, what needs no network, and what guessing gives."""
    shown = Table(title=heading, title_justify="left")
    for column in ("measure", "trained", "untrained", "bag of pieces", "chance"):
        shown.add_column(column, justify="left" if column == "measure" else "right")
    before, bags = _results(answer, "untrained"), _results(answer, "trivial")
    for name, one in _results(answer, "trained").items():
        shown.add_row(name, *map(_interval, (one, before.get(name), bags.get(name))), _plain(one["chance"]))
    for task, values in answer["trained"]["tasks"].items():
        was = answer.get("untrained", {}).get("tasks", {}).get(task, {})
        for name, value in values.items():
            if name != "loss":
                shown.add_row(f"{task}: {name}", _plain(value), _plain(was.get(name)))
    return shown


def page(runs: Sequence[Path]) -> str:
    """For a page in Markdown: how each run was made, and what was measured of it, as its folder says.

    Runs that differ by their seed alone are told together: means and spread over them.
    """
    alike: dict[str, list[Run]] = {}
    for opened in map(load, runs):
        record = read_record(opened.path)  # whose numbers name files as they were given, not each run's copy
        options = {name: value for name, value in record["options"].items() if name != "seed"}
        about = [record["recipe"]["name"], record.get("scale"), record["numbers"], options]
        alike.setdefault(json.dumps(about, sort_keys=True, default=str), []).append(opened)
    return "\n\n".join(_made(some) + "\n" + _measured(some) for some in alike.values())


def _made(runs: Sequence[Run]) -> str:
    first = read_record(runs[0].path)
    environment = first.get("environment", {})
    seeds = [str(one.record["options"]["seed"]) for one in runs]
    commits = {str(one.record.get("environment", {}).get("commit", "unknown"))[:7] for one in runs}
    told = [f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}", f"commit {', '.join(sorted(commits))}"]
    told += [f"{environment[name]} {name}" for name in ("threads", "processes") if name in environment]
    told += [f"torch {environment.get('torch')}", f"started {first['started']}"]
    steps = max(one.record.get("outcome", {}).get("step", 0) for one in runs)
    seconds = [seconds_of(read_metrics(path)) for one in runs if (path := one.path / "metrics.jsonl").exists()]
    if steps and seconds:
        each = " each" if len(runs) > 1 else ""
        took = np.mean(seconds)
        time = f"{took / 60:.1f} minutes" if took >= 60 else f"{took:.0f} seconds"
        told += [f"{steps:,} steps in {time}{each}, held-out losses included"]
    return f"```\n{again(first, runs[0].found)}\n```\n\n{', '.join(told)}.\n"


def _measured(runs: Sequence[Run]) -> str:
    """A table for each data that was measured on, of the newest weights."""
    newest = [_newest(kept(one.path)) for one in runs]
    tables, every = [], dict.fromkeys(data for one in newest for data in one)
    for data in every:
        answers = [one[data] for one in newest if data in one]
        told = markdown(answers[0]) if len(answers) == 1 else over_seeds(answers)
        tables.append(f"On {' '.join(data)}:\n\n{told}" if len(every) > 1 else told)
    return "\n\n".join(tables)


def _newest(answers: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    """The evaluations of the newest weights, by data."""
    last = max((one["step"] for one in answers), default=0)
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for one in answers:
        if one["step"] == last:
            found.setdefault(tuple(one["data"]), []).append(one)
    return found


def markdown(answers: Sequence[Mapping[str, Any]]) -> str:
    """Results of a run's evaluations on the same data, each measure as it was taken last; nothing is rounded but for
    showing it."""
    return as_table(HEAD, [
        [name, str(one.n), *map(_interval, (one.trained, one.untrained, one.gain, one.bag)), _plain(one.chance)]
        for name, one in _measures(answers).items()
    ])  # fmt: skip


def over_seeds(answers: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """Results of runs that differ by their seed: mean and deviation over the runs that a measure was taken of.

    "Better by" has a 95 percent interval by Student's t over seeds, of the differences within each.
    """
    found = [_measures(some) for some in answers]
    rows = []
    for name in dict.fromkeys(name for one in found for name in one):
        some = [one[name] for one in found if name in one]
        columns = ([getattr(one, what) for one in some] for what in ("trained", "untrained", "bag"))
        trained, untrained, bag = ([one["value"] for one in column if one is not None] for column in columns)
        better = [one.better for one in some if one.better is not None]
        shown = [spread(trained), spread(untrained), _over(better), spread(bag), _plain(some[0].chance)]
        rows.append([name, str(some[0].n), *shown])
    return as_table(HEAD, rows)


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What an evaluation says of one measure; values are mappings of "value" and, where there is one, an interval."""

    n: int
    trained: Mapping[str, float]
    untrained: Mapping[str, float] | None = None
    gain: Mapping[str, float] | None = None
    bag: Mapping[str, float] | None = None
    chance: float | None = None
    less: bool = False

    @property
    def better(self) -> float | None:
        """By how much trained is better than untrained."""
        if self.untrained is None:
            return None
        difference = self.trained["value"] - self.untrained["value"]
        return -difference if self.less else difference


def _measures(answers: Sequence[Mapping[str, Any]]) -> dict[str, Measure]:
    """By name, of each the newest."""
    found = {}
    for answer in answers:
        before, bags, gained = _results(answer, "untrained"), _results(answer, "trivial"), answer.get("gain", {})
        for name, one in _results(answer, "trained").items():
            found[name] = Measure(
                n=one["n"], trained=one, untrained=before.get(name), gain=gained.get(name), bag=bags.get(name),
                chance=one["chance"], less=one.get("less", False),
            )  # fmt: skip
        for task, values in answer["trained"]["tasks"].items():
            was = answer.get("untrained", {}).get("tasks", {}).get(task, {})
            if "loss" in values:
                found[f"{task}: loss"] = Measure(
                    n=answer["trained"]["rows"], trained={"value": values["loss"]}, less=True,
                    untrained={"value": was["loss"]} if "loss" in was else None,
                )  # fmt: skip
    return found


def _results(answer: Mapping[str, Any], which: str) -> dict[str, Mapping[str, Any]]:
    return {one["name"]: one for one in answer.get(which, {}).get("results", ())}


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _interval(one: Mapping[str, float] | None) -> str:
    if one is None:
        return ""
    return _plain(one["value"]) + (f" ({one['low']:.3f} to {one['high']:.3f})" if "low" in one else "")


def _over(values: Sequence[float]) -> str:
    """The mean over seeds with its interval."""
    if len(values) < 2:
        return spread(values)
    middle, low, high = student_interval(values)
    return _interval({"value": middle, "low": low, "high": high})
