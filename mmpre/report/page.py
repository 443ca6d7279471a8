"""The page: accounts, curves, tables and panels of some runs in one file of HTML that fetches nothing."""

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from mmpre.aside import file_aside
from mmpre.report.account import Account, about, read
from mmpre.report.chart import number
from mmpre.report.curves import groups
from mmpre.report.differences import differences
from mmpre.report.evaluations import tables
from mmpre.report.panels import panels, try_to_open
from mmpre.report.template import template
from mmpre.runs.record_check import RunError


def report(
    runs: Sequence[str | Path], out: str | Path | None = None, *, data: Sequence[str] = (), sidecar: str | None = None
) -> Path:
    """Write the report of some runs, by default into the first one's folder (report.html); returns where it is.

    Their networks are shown rows of their held-out shards, or of `data`. The file gets its name when it is whole.
    Raises RunError where a folder is no run.
    """
    if not runs:
        raise RunError("report: name a run's folder, or several")
    accounts = _labelled([Path(run) for run in runs])
    out = Path(out) if out else accounts[0].path / "report.html"
    if out.is_dir():
        raise RunError(f"report: {out} is a folder; name a file by --out, such as {out / 'report.html'}")
    write(out, render(accounts, data, sidecar))
    return out


def write(out: Path, text: str) -> None:
    """Put a text into a file that has its name only when it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with file_aside(out) as aside:
        aside.write_text(text, encoding="utf-8")


def render(accounts: Sequence[Account], data: Sequence[str] = (), sidecar: str | None = None) -> str:
    """The page's text. All that comes from runs and data is escaped; style and script are ours."""
    script = _own("script.js")
    names = [account.label or account.path.name for account in accounts]
    shown, measured, left_out = [], [], []
    accounts = list(accounts)
    for i, account in enumerate(accounts):
        opened, without = try_to_open(account.path, data, sidecar)
        if opened is not None:
            accounts[i] = replace(account, stages=tuple(stage.steps for stage in opened.recipe.stages))
        about_rows, found, more = panels(opened, account.path, data, sidecar) if opened is not None else ("", [], [])
        shown += [(account.label, about_rows, found)] if found else []
        kept, broken = tables(account.path)
        measured += [(account.label, kept)] if kept else []
        left_out += without + more + broken
    return template("page.html").render(
        title=" · ".join(names), runs=accounts, about=[about(account.found) for account in accounts],
        differences=differences(accounts) if len(accounts) > 1 else [], groups=groups(accounts),
        tables=measured, shown=shown, left_out=left_out,
        style=Markup(_own("style.css")), script=Markup(script), number=number, duration=_duration,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=version("mmpre"), made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip


def _labelled(paths: Sequence[Path]) -> list[Account]:
    """Accounts with short names that tell them apart; a single run needs none."""
    if len(paths) == 1:
        return [read(paths[0])]
    if twice := [str(path) for path, count in Counter(path.resolve() for path in paths).items() if count > 1]:
        raise RunError(f"report: {', '.join(twice)} is named twice; name different runs")
    short = Counter(path.resolve().name for path in paths)
    return [read(path, path.resolve().name if short[path.resolve().name] == 1 else str(path)) for path in paths]


def _own(name: str) -> str:
    return files("mmpre.report").joinpath("html", name).read_text(encoding="utf-8")


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes:.0f} min" if minutes < 100 else f"{hours:.1f} h"
