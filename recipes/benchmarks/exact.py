"""Exact mode, which adds up gradients in float64, against fast mode: what bit-equal results cost.

Both train BERT 6 x 256 with the same threads, on generated texts; once with a single micro-batch a step and once with
four, whose gradients must be added up.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from mmpre.benchmark import Comparison, Settings, Turn
from mmpre.recipes.benchmarks.bert import Case, training
from mmpre.recipes.benchmarks.harness import serve, take_turns, timed
from mmpre.recipes.benchmarks.loader import write_texts
from mmpre.recipes.benchmarks.texts import tokenizer_of

description = "exact mode against fast mode, with one micro-batch a step and with several"

TEXTS, VOCAB = 3_000, 8_000


def run(settings: Settings) -> Iterator[Comparison]:
    with TemporaryDirectory(prefix="mmpre-bench-") as folder:
        data = write_texts(Path(folder) / "texts", TEXTS)
        tokenizer = tokenizer_of(data, VOCAB, Path(folder))
        for parts in (1, 4):
            title = f"6 x 256, micro-batches {parts}"
            if settings.cases not in title:
                continue
            case = Case(
                data=str(data / "train"), tokenizer=str(tokenizer), width=256, depth=6, batch=64, micro_batches=parts,
                steps=settings.steps or 8,
            )  # fmt: skip
            turns = take_turns(__spec__.name, list(CONTENDERS), asdict(case), settings, title)
            about = {name: value for name, value in asdict(case).items() if name not in ("data", "tokenizer")}
            yield Comparison(title=title, unit="real tokens", turns=turns, about=about)


def train(exact: bool, **numbers: object) -> Turn:
    case = Case(**numbers)
    with closing(training(case, exact=exact)) as steps:
        return timed((step.counts["tokens"] for step in steps), warmup=case.warmup, count=case.steps)


CONTENDERS = {"exact": partial(train, True), "fast": partial(train, False)}

if __name__ == "__main__":
    serve(CONTENDERS)
