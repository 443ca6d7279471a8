"""How long mmpre takes to begin: its help, and a run from the start of the process to the end of its first step.

Beside them stands what cannot be saved: Python's own start, and the import of torch.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from mmpre.benchmark import Comparison, Settings, Turn
from mmpre.recipes.benchmarks.harness import peak_bytes, serve, take_turns
from mmpre.recipes.benchmarks.loader import write_texts

description = "seconds to `mmpre --help`, and to the first training step"

TEXTS = 200
CASES = {"mmpre --help": ["help", "python"], "to the first step of a tiny run": ["train", "import torch"]}


@dataclass(frozen=True)
class Case:
    data: str


def run(settings: Settings) -> Iterator[Comparison]:
    with TemporaryDirectory(prefix="mmpre-bench-") as folder:
        case = Case(str(write_texts(Path(folder) / "texts", TEXTS) / "train"))
        for title, contenders in CASES.items():
            if settings.cases in title:
                turns = take_turns(__spec__.name, contenders, asdict(case), settings, title)
                yield Comparison(title=title, unit="start", turns=turns, per_second=False)


def whole(command: Sequence[str], data: str) -> Turn:
    """The time of a process, to its end."""
    seconds, peak = watched([sys.executable, *command], lambda: False)
    return Turn(1, seconds, peak)


def train(data: str) -> Turn:
    """From the start of the process until its first step is written down."""
    with TemporaryDirectory(prefix="mmpre-bench-") as folder:
        out = Path(folder) / "run"
        options = ["--steps", "1", "--warmup", "0", "--log-every", "1"]
        command = [sys.executable, "-m", "mmpre", "train", "bert", "--scale", "tiny", "--data", data, "--out", str(out)]
        seconds, peak = watched([*command, *options], lambda: _begun(out / "metrics.jsonl"))
    return Turn(1, seconds, peak)


def watched(command: Sequence[str], done: Callable[[], bool]) -> tuple[float, int]:
    """Run a process; the seconds until `done` or its end, and its peak memory (of itself, not of its workers)."""
    with TemporaryFile("w+") as told:
        begun, seconds, peak = time.perf_counter(), None, 0
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=told, stderr=told)
        while process.poll() is None:
            peak = max(peak, peak_bytes(process.pid))
            if seconds is None and done():
                seconds = time.perf_counter() - begun
            time.sleep(0.002)
        seconds = seconds or time.perf_counter() - begun
        if process.returncode:
            told.seek(0)
            raise RuntimeError(told.read()[-2000:])
    return seconds, peak


def _begun(metrics: Path) -> bool:
    return metrics.exists() and metrics.stat().st_size > 0


CONTENDERS = {
    "help": partial(whole, ["-m", "mmpre", "--help"]), "python": partial(whole, ["-c", "pass"]),
    "train": train, "import torch": partial(whole, ["-c", "import torch"]),
}  # fmt: skip

if __name__ == "__main__":
    serve(CONTENDERS)
