"""metrics.jsonl: one line of JSON for each logged step; numbers are written so that they come back bit for bit."""

import json
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmpre.aside import append, file_aside
from mmpre.runs.loggers import Loggers

log = logging.getLogger(__name__)


class MetricsWriter:
    """Appends lines, each whole or not at all. A resumed run first drops the lines of steps that it will do again.

    Where the disk is full, lines are lost and counted, and training goes on: its state comes first.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.lost = path, 0
        self.also: Loggers | None = None  # which every line is handed on to

    def write(self, line: Mapping[str, Any]) -> None:
        self._append(line)
        if self.also is not None:
            self.also.write(line)

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            append(self.path, json.dumps(_finite(line), allow_nan=False) + "\n")
        except OSError as e:
            self.lost += 1
            if self.lost == 1:
                log.warning("%s cannot be written (%s); training goes on without its lines: make room", self.path, e)
            return
        if self.lost:
            log.warning("%s is written again; %d lines are missing", self.path, self.lost)
            self.lost = 0

    def written(self) -> set[tuple[int, bool]]:
        """Which lines there are: steps, each with whether it is a held-out one."""
        return {(line["step"], "valid" in line) for line in read_metrics(self.path)} if self.path.exists() else set()

    def truncate_after(self, step: int, *, held_out: bool = True) -> None:
        """Keep the lines up to a step, with or without the held-out losses after it; a line that was cut by a kill goes
        as well."""
        if not self.path.exists():
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= step]
        kept = [line for line in kept if held_out or "valid" not in line or line["step"] < step]
        with file_aside(self.path) as aside:
            aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a last one that was cut is left out."""
    lines = []
    for raw in path.read_bytes().splitlines(keepends=True):
        try:
            line = json.loads(raw) if raw.endswith(b"\n") else None
        except ValueError:
            line = None
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def seconds_of(lines: Iterable[Mapping[str, Any]]) -> float:
    """Time spent on steps up to the last of some lines, over all starts and stages, each of which counts anew."""
    total = last = 0.0
    for line in lines:
        now = line.get("time", {}).get("seconds", last)
        if now < last:  # another start, or the next stage
            total += last
        last = now
    return total + last


def _finite(value: Any) -> Any:
    """JSON has no NaN and infinities: they are written as text."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
