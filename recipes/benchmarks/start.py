"""How long mmpre takes to begin: its help, and a run from the start of the process to the end of its first step.

Beside them stands what cannot be saved: Python's own start, and the import of torch.
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from mmpre.benchmark import Comparison, Settings, Turn
from mmpre.recipes.benchmarks.harness import children_peak_bytes, serve, take_turns
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
    """The time of a process."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return Turn(1, time.perf_counter() - begun, children_peak_bytes())


def train(data: str) -> Turn:
    """From the start of the process until its first step is written down."""
    with TemporaryDirectory(prefix="mmpre-bench-") as folder:
        out = Path(folder) / "run"
        options = ["--steps", "1", "--warmup", "0", "--log-every", "1"]
        command = [sys.executable, "-m", "mmpre", "train", "bert", "--scale", "tiny", "--data", data, "--out", str(out)]
        with (Path(folder) / "told").open("w+") as told:
            begun = time.perf_counter()
            process = subprocess.Popen([*command, *options], stdout=told, stderr=told)
            while not _begun(out / "metrics.jsonl") and process.poll() is None:
                time.sleep(0.01)
            seconds = time.perf_counter() - begun
            if process.wait():
                told.seek(0)
                raise RuntimeError(told.read()[-2000:])
    return Turn(1, seconds, children_peak_bytes())


def _begun(metrics: Path) -> bool:
    return metrics.exists() and metrics.stat().st_size > 0


CONTENDERS = {
    "help": partial(whole, ["-m", "mmpre", "--help"]), "python": partial(whole, ["-c", "pass"]),
    "train": train, "import torch": partial(whole, ["-c", "import torch"]),
}  # fmt: skip

if __name__ == "__main__":
    serve(CONTENDERS)
