"""metrics.jsonl: one line of JSON for each logged step; numbers are written so that they come back bit for bit."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmpre.loggers import Loggers


class MetricsWriter:
    """Appends lines, each in one write. A resumed run first drops the lines of steps that it will do again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.also: Loggers | None = None  # which every line is handed on to

    def write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
        if self.also is not None:
            self.also.write(line)

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
        aside = self.path.with_name(f".{self.path.name}")
        aside.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(aside, self.path)


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


def _finite(value: Any) -> Any:
    """JSON has no NaN and infinities: they are written as text."""
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
