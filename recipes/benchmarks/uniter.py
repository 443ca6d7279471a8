"""UNITER's training step on ragged pairs, packed, against a padded single-stream model on transformers' BertModel.

All contenders have the same sizes, dropout, tasks (2:2:1:1, alignment included), heads, optimizer and one loading
worker, and read generated pairs with the lengths that the paper's data has (pairs.py):

    packed    mmpre's recipe
    padded    captions and regions padded (padded_uniter.py); the same rows with the same masks in each step
    buckets   the same, rows of like length put together, as the authors' TokenBucketSampler does
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.utils.data import Dataset

from mmpre.batch import Row, pack
from mmpre.benchmark import Comparison, Settings, Turn
from mmpre.data.index import open_shards
from mmpre.data.loader import MicroBatch, MicroBatches, Slot, load, slots
from mmpre.data.order import donor
from mmpre.data.sample import Sample
from mmpre.data.shards import ShardReader
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.modality import Reader
from mmpre.processes.processes import Processes
from mmpre.recipe import Recipe, Task
from mmpre.recipes.benchmarks.harness import quantiles, serve, take_turns, timed
from mmpre.recipes.benchmarks.pairs import write_pairs
from mmpre.recipes.uniter import uniter
from mmpre.training.loop import Context
from mmpre.training.loop import steps as train_steps
from mmpre.view import View

description = "UNITER on generated pairs against a padded single-stream model on transformers' BertModel"

AHEAD = 6  # steps that are loaded beyond the last one, so that loading goes on while the last ones are timed
CYCLE = 6  # steps in which every task has its share
PAIRS = 1536  # generated; the authors sort 8192 together


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and settings that all contenders share. `batch` pairs make a step.

    Steps are timed from the second cycle of tasks on, so that whole cycles are timed.
    """

    data: str
    tokenizer: str
    width: int
    depth: int
    features: int = 2048
    classes: int = 1601
    batch: int = 32
    dropout: float = 0.1
    bf16: bool = False
    steps: int = CYCLE
    warmup: int = 2

    @property
    def heads(self) -> int:
        return max(1, self.width // 64)

    @property
    def first(self) -> int:
        return CYCLE - self.warmup

    @property
    def last(self) -> int:
        return CYCLE + self.steps


USUAL = ("6 x 256, float32", "12 x 768, bfloat16")  # what is run where no case is asked for
SIZES = {"6 x 256": dict(width=256, depth=6, steps=2 * CYCLE), "12 x 768": dict(width=768, depth=12, steps=CYCLE)}


def run(settings: Settings) -> Iterator[Comparison]:
    titles = {
        f"{size}, {precision}": dict(numbers, bf16=precision == "bfloat16")
        for (size, numbers), precision in itertools.product(SIZES.items(), ("float32", "bfloat16"))
        if settings.cases in (title := f"{size}, {precision}") and (settings.cases or title in USUAL)
    }
    if not titles:
        return
    with TemporaryDirectory(prefix="mmpre-bench-") as folder:
        settings.say(f"generating {PAIRS} pairs")
        shards, tokenizer = write_pairs(Path(folder), PAIRS)
        for title, numbers in titles.items():
            numbers["steps"] = settings.steps or numbers["steps"]
            case = Case(data=str(shards), tokenizer=str(tokenizer), **numbers)
            turns = take_turns(__spec__.name, list(CONTENDERS), asdict(case), settings, title)
            about = {k: v for k, v in asdict(case).items() if k not in ("data", "tokenizer")}
            yield Comparison(title=title, unit="real tokens", turns=turns, about=about)


def packed(**numbers: object) -> Turn:
    case = Case(**numbers)
    recipe = recipe_of(case)
    stage, module = recipe.stages[0], recipe.module()
    optimizer, context = stage.optimizer.build(module.named_parameters()), Context(0, 0, Processes(), bf16=case.bf16)
    order = slots(stage, 0, case.first, case.last + AHEAD, 0, 1)
    with closing(load(source_of(case, recipe), order, workers=1)) as batches:
        steps = train_steps(stage, module, optimizer, batches, context, first=case.first, last=case.last)
        tokens = (step.counts["tokens"] for step in steps)
        return timed(tokens, warmup=case.warmup, count=case.steps, more={"padding %": 0.0})


def recipe_of(case: Case) -> Recipe:
    torch.manual_seed(0)
    return uniter(
        data=(case.data,), tokenizer=case.tokenizer, width=case.width, depth=case.depth, heads=case.heads,
        features=case.features, classes=case.classes, batch=case.batch, micro_batches=1, steps=case.last + AHEAD,
        warmup=0, dropout=case.dropout,
    )  # fmt: skip


def source_of(case: Case, recipe: Recipe) -> MicroBatches:
    """What makes the micro-batches of a step."""
    return MicroBatches.of(recipe.stages[0], Units(ShardReader(open_shards(case.data))), seed=0, number=0)


def padded(**numbers: object) -> Turn:
    case = Case(**numbers)
    recipe = recipe_of(case)
    return _theirs(case, recipe, source_of(case, recipe))


def buckets(**numbers: object) -> Turn:
    case = Case(**numbers)
    recipe = recipe_of(case)
    return _theirs(case, recipe, Buckets(source_of(case, recipe), recipe, case))


class Buckets(Dataset):
    """The micro-batches of another source, but with rows of like length in each, the exchanged regions counted."""

    def __init__(self, source: MicroBatches, recipe: Recipe, case: Case) -> None:
        self.source = source
        stage, everyone = recipe.stages[0], np.arange(len(source.units))
        sorted_units = {task.name: everyone[np.argsort(self._lengths(task), kind="stable")] for task in stage.tasks}
        whole = len(everyone) // case.batch
        self.units = []
        for step, quantile in enumerate(quantiles(CYCLE, case.last, AHEAD)):
            start = int(quantile * whole) * case.batch
            self.units.append(sorted_units[stage.task_at(step, seed=0).name][start : start + case.batch])

    def __getitem__(self, slot: Slot) -> MicroBatch:
        view, readers = self.source.work[slot.task]
        units = self.units[slot.step].tolist()
        return MicroBatch(slot, [pack([self._row(u, view, readers) for u in units], view.attend.plan)], [], units)

    def _lengths(self, task: Task) -> list[int]:
        view = replace(task.view, picks={}, corruption=None)
        return [self._row(u, view, task.objective.readers).length for u in range(len(self.source.units))]

    def _row(self, unit: int, view: View, readers: Mapping[str, Reader]) -> Row:
        units = self.source.units

        def other(role: str, k: int) -> Sample:
            return units.sample(donor(unit, len(units), 0, f"{role}{k}", own=unit))

        return view.row(units.sample(unit), readers, Draw.row(0, 0, 0, epoch=0, unit=unit), other)


def _theirs(case: Case, recipe: Recipe, source: Dataset) -> Turn:
    """Train the padded model by a plain loop."""
    from mmpre.recipes.benchmarks.padded_uniter import PaddedBatches, PaddedUniter

    torch.manual_seed(0)
    stage = recipe.stages[0]
    model = PaddedUniter(
        width=case.width, depth=case.depth, heads=case.heads, features=case.features, classes=case.classes,
        vocabulary=recipe.network.readers["text"].vocabulary.size, dropout=case.dropout,
    ).train()  # fmt: skip
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=5e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01, fused=True
    )
    draw, sizes = Draw.micro_batch(0, 0, 0, 0), []
    del recipe
    batches = load(PaddedBatches(source), slots(stage, 0, case.first, case.last + AHEAD, 0, 1), workers=1)

    def steps() -> Iterator[int]:
        for made in batches:
            (batch,) = made.parts
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.bf16):
                loss = model(made.slot.task, batch, draw)
            loss.total(batch.batch.counts).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sizes.append((len(batch.place_N), batch.valid_BL.numel()))
            yield len(batch.place_N)

    with closing(batches):
        turn = timed(steps(), warmup=case.warmup, count=case.steps)
    real, places = (sum(column) for column in zip(*sizes[case.warmup :], strict=True))
    return replace(turn, more={"padding %": 100 * (1 - real / places)})


CONTENDERS = {"packed": packed, "padded": padded, "buckets": buckets}

if __name__ == "__main__":
    serve(CONTENDERS)
