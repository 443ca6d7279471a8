"""The recipe of two stages: it learns in both, its windows grow, and it goes on where it was killed."""

import shutil
from pathlib import Path

import numpy as np
import torch
import webdataset

import mmpre
import mmpre.recipes.two_stage as recipe_file
from mmpre.recipes.two_stage import scales, two_stage
from mmpre.runs.metrics import read_metrics
from mmpre.runs.options import RunOptions

TINY = dict(
    width=32, depth=2, heads=2, short=16, long=48, short_batch=16, long_batch=6, micro_batches=2, short_steps=50,
    long_steps=14, short_warmup=5, long_warmup=3, short_lr=5e-3, long_lr=2e-3, dropout=0.1, valid_every=25,
)  # fmt: skip


def lines(run):
    return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(run / "metrics.jsonl")]


def test_it_learns_and_grows_its_windows_and_ends_alike_after_a_kill(tmp_path):
    rng = np.random.default_rng(0)
    with webdataset.ShardWriter(str(tmp_path / "t-%03d.tar"), verbose=0) as sink:
        for i in range(30):
            text = "".join("abc"[(j + i) % 3] for j in range(rng.integers(40, 120)))
            sink.write({"__key__": f"t{i:02d}", "txt": text.encode()})
    data = (str(tmp_path / "t-000.tar"),)
    options = RunOptions(exact=True, workers=0, save_every=10, log_every=1, keep=99)
    run = mmpre.train(Path(recipe_file.__file__), out=tmp_path / "run", options=options, data=data, valid=data, **TINY)
    whole, trained = lines(run), [line for line in lines(run) if "loss" in line]
    assert np.mean([line["loss"] for line in trained[45:50]]) < 0.7 * np.mean([line["loss"] for line in trained[:5]])
    assert np.mean([line["loss"] for line in trained[50:]]) < np.mean([line["loss"] for line in trained[:25]])
    assert max(line["tokens"] / line["rows"] for line in trained[:50]) <= 16
    assert max(line["tokens"] / line["rows"] for line in trained[50:]) > 30
    rates = [line["lr"] for line in trained]
    assert max(rates[:50]) == 5e-3 and max(rates[50:]) == 2e-3 and rates[50] < rates[51] > 0
    weights = mmpre.load(run).recipe.module().state_dict()
    for step in (60, 40):  # in the second stage, then in the first
        for path in (run / "checkpoints").glob("step-*"):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        mmpre.resume(run)
        assert lines(run) == whole
        again = mmpre.load(run).recipe.module().state_dict()
        assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_head_is_one_and_every_scale_says_what_the_paper_does():
    recipe = two_stage(**scales["tiny"] | dict(width=16, depth=1, heads=2))
    first, second = (stage.tasks[0] for stage in recipe.stages)
    assert first.objective.readouts[0] is second.objective.readouts[0]
    assert [reader.max_length for reader in (*first.readers, *second.readers)] == [64, 256]
    for scale in scales.values():
        numbers = {"short_steps": 900_000, "long_steps": 100_000} | scale
        assert numbers["short_steps"] == 9 * numbers["long_steps"]
