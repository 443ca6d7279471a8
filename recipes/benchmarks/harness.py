"""Run contenders in turn, each in a process of its own, and compare them.

A contender trains for some steps and tells how many real tokens (no padding) it got through, in which time, and its
process's peak memory. Contenders take turns, A B A B ..., so that a machine whose speed drifts treats them alike; what
counts is the ratio of a pair of neighbours, and its spread.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Measured:
    """What one turn of a contender gave."""

    tokens: int
    seconds: float
    peak_bytes: int
    more: Mapping[str, float]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def measure(step: Callable[[], int], *, warmup: int, steps: int, **more: float) -> None:
    """Run a contender's step (it returns the real tokens of the step) and print what `compare` reads."""
    for _ in range(warmup):
        step()
    started = time.perf_counter()
    tokens = sum(step() for _ in range(steps))
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"tokens": tokens, "seconds": seconds, "peak_bytes": peak, "more": more}))


def compare(
    module: str, contenders: Mapping[str, Sequence[str]], *, repeats: int, threads: int, say: Callable[[str], None]
) -> dict[str, list[Measured]]:
    """Let the contenders of a module take turns; returns their turns by name, the first contender being ours."""
    turns: dict[str, list[Measured]] = {name: [] for name in contenders}
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    for repeat in range(repeats):
        for name, arguments in contenders.items():
            say(f"{name}: turn {repeat + 1} of {repeats}")
            command = [sys.executable, "-m", module, *arguments]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"benchmark contender {name} failed:\n{done.stderr[-2000:]}")
            turns[name].append(Measured(**json.loads(done.stdout.strip().splitlines()[-1])))
    return turns


def summary(turns: Mapping[str, Sequence[Measured]], **about: Any) -> dict[str, Any]:
    """Medians, and the ratio of the first contender to each other one, turn by turn."""
    ours = next(iter(turns))
    rows = {}
    for name, some in turns.items():
        ratios = [a.rate / b.rate for a, b in zip(turns[ours], some, strict=True)]
        rows[name] = {
            "tokens_per_second": round(median(one.rate for one in some), 1),
            "peak_mb": round(median(one.peak_bytes for one in some) / 1e6, 1),
            "ratio": {"median": round(median(ratios), 3), "low": round(min(ratios), 3), "high": round(max(ratios), 3)},
            "more": {key: round(median(one.more[key] for one in some), 4) for key in some[0].more},
        }
    return {"ours": ours, "contenders": rows, "turns": len(turns[ours]), "machine": machine(), **about}


def machine() -> dict[str, Any]:
    model = platform.processor()
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform(), "date": date.today().isoformat()}


def show(name: str, result: Mapping[str, Any], console: Console) -> None:
    """A table of one benchmark's result."""
    table = Table(title=f"{name}: {result['what']}", title_justify="left")
    for column in ("contender", "real tokens/s", f"{result['ours']} is faster by (spread)", "peak MB"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    for contender, row in result["contenders"].items():
        ratio = row["ratio"]
        times = (
            "" if contender == result["ours"] else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        )
        table.add_row(contender, f"{row['tokens_per_second']:,.0f}", times, f"{row['peak_mb']:,.0f}")
    console.print(table)


def endless(make: Callable[[], Iterator[Any]]) -> Iterator[Any]:
    """Begin again where an iterator ends."""
    while True:
        yield from make()
