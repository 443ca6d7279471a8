"""Two processes of one thread each, started by torchrun and joined by gloo, against one process of one thread.

The same steps of BERT 6 x 256 on generated texts, two micro-batches each. Needs a core for each process.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from mmpre.benchmark import Comparison, Settings, Turn
from mmpre.processes.processes import Processes
from mmpre.recipes.benchmarks.bert import Case, training
from mmpre.recipes.benchmarks.harness import serve, take_turns, timed
from mmpre.recipes.benchmarks.loader import write_texts
from mmpre.recipes.benchmarks.texts import tokenizer_of

description = "two processes of one thread against one process of one thread"

TEXTS, VOCAB = 3_000, 8_000


def run(settings: Settings) -> Iterator[Comparison]:
    title = "6 x 256, one thread each"
    if settings.cases not in title:
        return
    with TemporaryDirectory(prefix="mmpre-bench-") as folder:
        data = write_texts(Path(folder) / "texts", TEXTS)
        case = Case(
            data=str(data / "train"), tokenizer=str(tokenizer_of(data, VOCAB, Path(folder))), width=256, depth=6,
            batch=64, micro_batches=2, steps=settings.steps or 10,
        )  # fmt: skip
        turns = take_turns(__spec__.name, ["two", "one"], asdict(case), replace(settings, threads=1), title)
        about = {name: value for name, value in asdict(case).items() if name not in ("data", "tokenizer")}
        yield Comparison(title=title, unit="real tokens", turns=turns, about=about)


def two(**numbers: object) -> Turn:
    """The turn of the first of two processes; tokens are counted over both, memory is the larger one's."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", __spec__.name, "one", json.dumps(numbers)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    # both tell their turn, and their lines may come in one another's
    decoder, text, turns = json.JSONDecoder(), done.stdout, []
    while (start := text.find("{")) >= 0:
        told, end = decoder.raw_decode(text[start:])
        turns.append(Turn(**told))
        text = text[start + end :]
    return replace(turns[0], peak_bytes=max(turn.peak_bytes for turn in turns))


def one(**numbers: object) -> Turn:
    case, processes = Case(**numbers), Processes.start()
    try:
        with closing(training(case, processes=processes)) as steps:
            return timed((step.counts["tokens"] for step in steps), warmup=case.warmup, count=case.steps)
    finally:
        processes.stop()


CONTENDERS = {"two": two, "one": one}

if __name__ == "__main__":
    serve(CONTENDERS)
