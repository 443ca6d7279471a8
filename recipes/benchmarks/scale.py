"""A million samples against a thousand: speed, the time to begin anywhere, and memory over a run.

Tiny pictures are written to a temporary folder, and a tiny MAE is trained on them. A million stand in a hundred shards,
which are ten files under ten names each (a tar takes a kilobyte for a sample, so they would fill a gigabyte): shards,
samples and positions are as many as they say, contents and keys are not. "grown MB" is by how much the trainer and its
loading worker had grown from the first timed step to the last.
"""

import io
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

from mmpre.benchmark import Comparison, Settings, Turn
from mmpre.data.index import open_shards
from mmpre.data.loader import MicroBatch, MicroBatches, load, slots
from mmpre.data.prefetch import Prefetch
from mmpre.data.shards import ShardReader, shard_writer
from mmpre.data.units import Units
from mmpre.processes.processes import Processes
from mmpre.recipe import Stage
from mmpre.recipes.benchmarks.harness import peak_bytes, serve, take_turns, timed
from mmpre.recipes.mae import mae
from mmpre.training.loop import Context
from mmpre.training.loop import steps as train_steps

description = "a million samples against a thousand: speed, resuming, memory"

SIZES = {"many": 1_000_000, "few": 1_000}
SHARD = 10_000  # samples
FILES = 10  # with contents of their own
SIDE_PX = 16


@dataclass(frozen=True, kw_only=True)
class Case:
    """`many` and `few` are folders of shards; `position` is the row that a run is taken up at."""

    many: str
    few: str
    position: int
    steps: int
    batch: int = 64
    warmup: int = 20


def run(settings: Settings) -> Iterator[Comparison]:
    titles = {"a million samples against a thousand": ["many", "few"], "to the first batch": ["far", "begin"]}
    titles = {title: names for title, names in titles.items() if settings.cases in title}
    if not titles:
        return
    with TemporaryDirectory(prefix="mmpre-bench-") as folder:
        for name, count in SIZES.items():
            settings.say(f"writing {count:,} samples")
            write(Path(folder) / name, count, settings.threads)
            open_shards(f"{folder}/{name}")  # indexed now, not in somebody's turn
        case = Case(
            many=f"{folder}/many", few=f"{folder}/few", position=SIZES["many"] * 9 // 10, steps=settings.steps or 200
        )
        for title, names in titles.items():
            turns = take_turns(__spec__.name, names, asdict(case), settings, title)
            speed = names == ["many", "few"]
            about = {"samples": SIZES, "position": case.position, "batch": case.batch, "steps": case.steps}
            unit = "real tokens" if speed else "batch"
            yield Comparison(title=title, unit=unit, turns=turns, about=about, per_second=speed)


def write(folder: Path, count: int, processes: int) -> None:
    """Write samples to shards, each shard by itself; those past FILES are further names of the first ones."""
    ranges = [range(first, min(first + SHARD, count)) for first in range(0, count, SHARD)[:FILES]]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_write_shard, itertools.repeat(folder), itertools.count(), ranges))
    files = sorted(folder.glob("*.tar"))
    for i in range(len(files), -(-count // SHARD)):
        (folder / f"again-{i:06d}.tar").hardlink_to(files[i % len(files)])


def _write_shard(folder: Path, number: int, samples: range) -> None:
    pictures = []
    for seed in range(16):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 256, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8) // 64 * 64
        Image.fromarray(pixels).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    with shard_writer(folder, start=number, maxcount=len(samples)) as sink:
        for i in samples:
            sink.write({"__key__": f"picture{i:07d}", "png": pictures[i % len(pictures)]})


def train(which: str, **numbers: object) -> Turn:
    case = Case(**numbers)
    stage = stage_of(case, getattr(case, which))
    (task,) = stage.tasks
    optimizer = stage.optimizer.build(task.objective.named_parameters())
    with closing(batches_of(stage, first=0)) as batches:
        context = Context(0, 0, Processes())
        steps = train_steps(stage, task.objective, optimizer, batches, context, first=0, last=stage.steps)
        sizes = []

        def tokens() -> Iterator[int]:
            for step in steps:
                if step.step >= case.warmup - 1:
                    sizes.append(resident_bytes())
                yield step.counts["tokens"]

        turn = timed(tokens(), warmup=case.warmup, count=case.steps)
    return Turn(turn.amount, turn.seconds, turn.peak_bytes, {"grown MB": (sizes[-1] - sizes[0]) / 1e6})


def first_batch(away: bool, **numbers: object) -> Turn:
    """From opening the shards to the first batch, at the start or at the case's position."""
    case = Case(**numbers)
    stage = stage_of(case, case.many)
    begun = time.perf_counter()
    with closing(batches_of(stage, first=case.position // case.batch if away else 0)) as batches:
        next(batches)
        return Turn(1, time.perf_counter() - begun, peak_bytes())


def stage_of(case: Case, data: str) -> Stage:
    torch.manual_seed(0)
    return mae(
        data=(data,), width=32, depth=1, heads=1, decoder_width=32, decoder_depth=1, decoder_heads=1, patch_px=4,
        side_px=0, batch=case.batch, micro_batches=1, steps=case.warmup + case.steps, warmup=1,
    ).stages[0]  # fmt: skip


def batches_of(stage: Stage, *, first: int) -> Prefetch[MicroBatch]:
    source = MicroBatches.of(stage, Units(ShardReader(open_shards(stage.data))), seed=0, number=0)
    return load(source, slots(stage, 0, first, first + stage.steps + 8, 0, 1), workers=1)


def resident_bytes() -> int:
    """What this process and those that it has started have resident now (Linux; elsewhere 0)."""
    total = 0
    for pid in ["self", *(child.pid for child in multiprocessing.active_children())]:
        try:
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
        total += pages * os.sysconf("SC_PAGE_SIZE")
    return total


CONTENDERS = {
    "many": partial(train, "many"), "few": partial(train, "few"),
    "far": partial(first_batch, True), "begin": partial(first_batch, False),
}  # fmt: skip

if __name__ == "__main__":
    serve(CONTENDERS)
