"""Rows that grow longer within a stage: a function of the step alone, so resuming and other shapes change nothing."""

import shutil

import numpy as np
import pytest

import mmpre
from mmpre.data.index import open_shards
from mmpre.data.loader import MicroBatches, load, slots, valid_slots
from mmpre.data.sample import Sample
from mmpre.data.shards import ShardReader, shard_writer
from mmpre.data.units import Units, measure
from mmpre.draw import Draw
from mmpre.modalities.text import TextReader
from mmpre.recipe import Stage, Task
from mmpre.recipes.bert import bert
from mmpre.runs.checkpoint import of_run
from mmpre.runs.metrics import read_metrics
from mmpre.runs.options import RunOptions
from mmpre.schedules import Constant, LengthRamp
from mmpre.training.optim import AdamW
from mmpre.view import View

TINY = dict(
    width=16, depth=1, heads=1, length=64, first_length=8, growth=9, batch=8, micro_batches=2, steps=12, warmup=1,
    dropout=0.1, valid_every=12,
)  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("texts"), np.random.default_rng(0)
    with shard_writer(folder) as sink:
        for i in range(60):
            words = rng.integers(0, 1000, size=rng.integers(2, 40))
            sink.write({"__key__": f"t{i:02d}", "txt": " ".join(f"{word}" for word in words)})
    return (str(folder),)


def source_and_stage(texts):
    stage = bert(data=texts, **TINY).stages[0]
    (task,) = stage.tasks
    shards = open_shards(texts)
    units = measure(Units(ShardReader(shards)), task.objective.readers.values(), shards.cache)
    return MicroBatches.of(stage, units, seed=0, number=0), stage


def stream(texts, *, world=1, workers=0, first=0):
    source, stage = source_and_stage(texts)
    made = {}
    for rank in range(world):
        for one in load(source, slots(stage, 0, first, 12, rank, world), workers):
            (part,) = one.parts
            rows = (
                part.layout.lengths_B.tolist(),
                part.seen["text"]["ids"].tolist(),
                part.picked["word"].seen_M.tolist(),
            )
            made[one.slot.step, one.slot.m] = one.units, rows
    return made


def test_the_bound_is_the_line_rounded_down_and_ends():
    ramp = LengthRamp(first=10, last=50, steps=7)
    assert [ramp.at(step) for step in range(9)] == [10, 15, 21, 27, 32, 38, 44, None, None]
    for wrong in (dict(first=0, last=5, steps=1), dict(first=6, last=5, steps=1), dict(first=1, last=5, steps=0)):
        with pytest.raises(ValueError, match=r"LengthRamp: wanted at least 1 step and 1 <= first <= last, got Length"):
            LengthRamp(**wrong)


def test_a_stage_whose_readers_cannot_shorten_rows_is_refused():
    task = Task("sounds", View(readers={"sound": object()}), type("Nothing", (), {"readers": {}})())
    with pytest.raises(ValueError, match="task sounds: a length ramp needs a reader that can shorten rows"):
        Stage(tasks=[task], data=("x.tar",), steps=1, batch=1, optimizer=AdamW(lr=1e-3, schedule=Constant()),
              length=LengthRamp(first=3, last=9, steps=2))  # fmt: skip


def test_a_longer_row_gives_one_of_its_shorter_windows_of_whole_words_and_others_in_time():
    reader = TextReader("bytes", max_length=40, windowed=True)
    sample = Sample("a", "shard", "digest", {"txt": b"one two three four five six seven eight nine ten eleven twelve"})
    words = reader.tokenize(sample, Draw.row(0, 0, 0, epoch=0, unit=0))["word"].tolist()
    seen = set()
    for epoch in range(60):
        tokens = reader.tokenize(sample.at_most(14), Draw.row(0, 0, 0, epoch=epoch, unit=0))
        row = tokens["word"][1:-1].tolist()
        assert len(tokens) <= 14 and tokens["position"].tolist() == list(range(len(tokens)))
        assert row == [word for word in words if word in row]  # neighbours, and no word in part
        seen |= set(row)
    assert seen | {-1} == set(words)
    whole = reader.tokenize(sample.at_most(40), Draw.row(0, 0, 0, epoch=0, unit=0))
    assert whole["word"].tolist() == words


def test_rows_grow_with_the_step_and_stay_the_units_that_they_were(texts):
    source, stage = source_and_stage(texts)
    longest = {}
    for (step, _), (units, (lengths, _, _)) in stream(texts).items():
        longest[step] = max(longest.get(step, 0), *lengths)
        full = source.units.lengths(np.asarray(units))
        assert all(length <= (stage.length_at(step) or 64) for length in lengths)
        assert sorted(lengths) <= sorted(full.tolist())
    assert longest[0] <= 8 and longest[4] > 16 and max(longest[step] for step in (9, 10, 11)) > 60
    plain = bert(data=texts, **TINY | {"first_length": 0}).stages[0]
    assert [plain.batch_at(step) for step in range(12)] == [stage.batch_at(step) for step in range(12)]
    assert all(slot.most is None for slot in valid_slots(stage, 8))


@pytest.mark.parametrize(("world", "workers"), [(1, 3), (2, 1)])
def test_the_stream_is_the_same_for_other_shapes_and_from_any_step_on(texts, world, workers):
    whole = stream(texts)
    assert stream(texts, world=world, workers=workers) == whole
    rest = stream(texts, world=world, workers=workers, first=5)
    assert rest == {place: made for place, made in whole.items() if place[0] >= 5}


def test_a_run_taken_up_within_the_ramp_ends_bit_for_bit_alike(texts, tmp_path):
    options = RunOptions(exact=True, workers=0, log_every=1, save_every=4, keep=9)
    whole = mmpre.train(bert, out=tmp_path / "whole", options=options, data=texts, **TINY)
    cut = shutil.copytree(whole, tmp_path / "cut")
    for folder in cut.glob("checkpoints/*"):
        if not folder.name.endswith("00004"):
            shutil.rmtree(folder)
    assert of_run(cut).step == 4
    mmpre.resume(cut, workers=2)

    def lines(run):
        return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(run / "metrics.jsonl")]

    assert lines(cut) == lines(whole)
    a, b = (of_run(run).tensors["model"] for run in (whole, cut))
    assert all((a[name] == b[name]).all() for name in a)
