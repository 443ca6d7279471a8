"""Benchmarks: finding and running them, what they give back, and how that is compared and shown.

A benchmark is a module under the entry point group `mmpre.benchmarks` with a `description` and
`run(settings: Settings) -> Iterable[Comparison]`. Contenders take turns, A B A B ..., so that a machine whose speed
drifts treats them alike; what counts is the ratio within a round of turns, and its spread.
"""

import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from mmpre import markdown
from mmpre.aside import file_aside
from mmpre.plugins import find_benchmark
from mmpre.runs.commit import commit, short

MEASURED_WITH = ("mmpre", "torch", "transformers", "webdataset")


class BenchmarkError(RuntimeError):
    """A benchmark that cannot be run, and what is missing."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked of all benchmarks.

    `steps` stands in for each benchmark's own number of timed steps; `cases` leaves out those whose title does not
    hold it; `data` are folders of data sets; `fetch` allows to download the one that is missing.
    """

    repeats: int = 3
    threads: int = field(default_factory=lambda: os.cpu_count() or 1)
    steps: int | None = None
    cases: str = ""
    data: tuple[Path, ...] = ()
    fetch: bool = False
    say: Callable[[str], None] = lambda text: None

    def __post_init__(self) -> None:
        for name in ("repeats", "threads", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"bench: {name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Turn:
    """What one turn of a contender gave: an amount of work (real tokens, rows ...), its time, the process's memory.

    `more` are other figures by the heading they are shown under.
    """

    amount: float
    seconds: float
    peak_bytes: int
    more: Mapping[str, float] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """Amount per second."""
        return self.amount / self.seconds


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Turns by contender, the first one being ours. `unit` says what amounts count; `about` holds sizes and settings.

    With `per_second`, the rate is shown, and otherwise the seconds that one unit takes. Either way a ratio above 1
    means that ours is faster.
    """

    title: str
    unit: str
    turns: Mapping[str, Sequence[Turn]]
    about: Mapping[str, Any] = field(default_factory=dict)
    per_second: bool = True

    @property
    def ours(self) -> str:
        return next(iter(self.turns))

    def ratios(self, name: str) -> list[float]:
        """How many times as fast as a contender ours was, round by round."""
        return [a.rate / b.rate for a, b in zip(self.turns[self.ours], self.turns[name], strict=True)]

    def summary(self) -> dict[str, Any]:
        """Medians and spreads of each contender, and every turn."""
        return {
            "title": self.title, "unit": self.unit, "per_second": self.per_second, "ours": self.ours,
            "about": dict(self.about),
            "contenders": {name: self._contender(name) for name in self.turns},
        }  # fmt: skip

    def _contender(self, name: str) -> dict[str, Any]:
        turns = self.turns[name]
        return {
            "per_second": spread([turn.rate for turn in turns]),
            "ours_is_faster_by": spread(self.ratios(name)),
            "peak_mb": spread([turn.peak_bytes / 1e6 for turn in turns]),
            "more": {key: spread([turn.more[key] for turn in turns]) for key in turns[0].more},
            "turns": [asdict(turn) for turn in turns],
        }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest value, to four digits."""
    return {
        "median": float(f"{median(values):.4g}"), "low": float(f"{min(values):.4g}"),
        "high": float(f"{max(values):.4g}"),
    }  # fmt: skip


def run(which: Iterable[str], settings: Settings, *, as_json: bool = False, out: Path | None = None) -> None:
    """Run benchmarks by name and print a table of each comparison as it is done, or one JSON object at the end.

    `out` is a file that everything is written to as well, after each comparison: as JSON or, where its name ends in
    .md, as tables to be read. Raises BenchmarkError at the end where a benchmark could not be run; the others are run
    all the same.
    """
    if out is not None and out.suffix not in (".json", ".md"):
        raise BenchmarkError(f"bench: out must be a file that ends in .json or .md, got {out}")
    modules = {name: find_benchmark(name) for name in which}
    result: dict[str, Any] = {
        "machine": machine(settings.threads), "command": command(), "repeats": settings.repeats, "seconds": {},
        "benchmarks": {},
    }  # fmt: skip
    failed, without = [], []
    for name, module in modules.items():
        done, begun = result["benchmarks"].setdefault(name, []), time.monotonic()
        try:
            for comparison in module.run(settings):
                done.append(comparison.summary())
                result["seconds"][name] = round(time.monotonic() - begun)
                if not as_json:
                    show(name, comparison)
                if out is not None:
                    _write(out, result)
        except BenchmarkError as e:
            failed.append(str(e))
        else:
            if not done:
                without.append(f"bench {name}: no case has {settings.cases!r} in its title")
    if not any(result["benchmarks"].values()):
        failed += without
    if as_json:
        print(json.dumps(result, indent=2))
    elif any(result["benchmarks"].values()):
        print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    if failed:
        raise BenchmarkError("\n".join(failed))


def show(name: str, comparison: Comparison) -> None:
    """Print a table of one comparison."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 120)
    table = Table(title=f"{name}: {comparison.title}", title_justify="left")
    headings, *rows = cells(comparison.summary())
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "contender" else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def cells(told: Mapping[str, Any]) -> list[list[str]]:
    """The table of one comparison's summary: its headings, then a row for each contender."""
    ours, contenders, per_second = told["ours"], told["contenders"], told["per_second"]
    more = list(dict.fromkeys(key for one in contenders.values() for key in one["more"]))
    speed = f"{told['unit']}/s" if per_second else f"seconds/{told['unit']}"
    rows = [["contender", speed, f"{ours} is faster by", "peak MB", *more]]
    for contender, one in contenders.items():
        rate, ratio = one["per_second"]["median"], one["ours_is_faster_by"]
        rows.append([
            contender,
            f"{rate:,.0f}" if per_second else f"{1 / rate:.3f}",
            "" if contender == ours else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
            f"{one['peak_mb']['median']:,.0f}",
            *(f"{one['more'][key]['median']:.1f}" if key in one["more"] else "" for key in more),
        ])  # fmt: skip
    return rows


def as_markdown(result: Mapping[str, Any]) -> str:
    """What a run of benchmarks found, as a page: what was run, where and when, and a table for each comparison."""
    ran = [f"{key} {value}" for key, value in result["machine"].items()]
    lines = [
        "# Speed, as `mmpre bench` measured it", "", f"    {result['command']}", "",
        f"Contenders took turns, {result['repeats']} each; rates and memory are medians, ratios have their lowest and "
        "highest", "value beside them. Above 1 means that mmpre is faster.", "", f"{', '.join(ran)}", "",
    ]  # fmt: skip
    for name, comparisons in result["benchmarks"].items():
        for told in comparisons:
            headings, *rows = cells(told)
            lines += [f"## {name}: {told['title']}", "", markdown.table(headings, rows), ""]
    return "\n".join(lines)


def command() -> str:
    """What was typed, for the one who wants to do it again."""
    return shlex.join(["mmpre", *sys.argv[1:]])


def machine(threads: int) -> dict[str, Any]:
    """Where and with what the figures were taken; `load` is the machine's before the first turn (1-minute mean)."""
    return {
        "cpu": _cpu(), "cores": os.cpu_count(), "threads": threads, "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(), "python": platform.python_version(),
        **{package: version(package) for package in MEASURED_WITH}, "commit": short(commit()),
        "date": date.today().isoformat(),
    }  # fmt: skip


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _write(out: Path, result: Mapping[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with file_aside(out) as aside:
        aside.write_text(as_markdown(result) if out.suffix == ".md" else json.dumps(result, indent=2) + "\n")
