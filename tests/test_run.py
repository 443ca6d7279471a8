"""Whole runs: they learn, and a run that is killed anywhere goes on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

import mmpre
from mmpre.processes.peers import digest_of_code
from mmpre.runs.metrics import read_metrics
from mmpre.runs.options import RunOptions
from mmpre.runs.progress import Progress
from mmpre.runs.record_check import check_data
from mmpre.runs.run import RunError
from mmpre.training.loop import Step

TONES = Path(__file__).parent / "tones.py"


@pytest.fixture(scope="module")
def melodies(tmp_path_factory):
    """Melodies whose notes rise by one step each: a hidden note can be told from its neighbours."""
    folder = tmp_path_factory.mktemp("melodies")
    rng = np.random.default_rng(0)
    for split, count in (("train", 200), ("valid", 40)):
        with webdataset.ShardWriter(str(folder / f"{split}-%03d.tar"), maxcount=90, verbose=0) as sink:
            for i in range(count):
                first, length = rng.normal(), rng.integers(4, 12)
                notes = " ".join(f"{first + 0.2 * n:.3f}" for n in range(length))
                sink.write({"__key__": f"{split}{i:03d}", "notes": notes.encode()})
    return folder


def shards(folder, split):
    return tuple(str(path) for path in sorted(folder.glob(f"{split}-*.tar")))


def numbers(folder):
    return {"data": shards(folder, "train"), "valid": shards(folder, "valid")}


def lines(run):
    return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(run / "metrics.jsonl")]


def weights(run):
    return mmpre.load(run).recipe.module().state_dict()


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def start(out, folder, *more, resume=False):
    command = [sys.executable, "-m", "mmpre"]
    if resume:
        command += ["resume", str(out)]
    else:
        command += ["train", str(TONES), "--out", str(out), "--exact", "--save-every", "7", "--log-every", "1"]
        command += ["--data", *shards(folder, "train"), "--valid", *shards(folder, "valid")]
    env = os.environ | {"OMP_NUM_THREADS": "2"}  # exact mode sets its own
    return subprocess.Popen([*command, *more], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill_at(process, run, step):
    """Kill -9 as soon as the metrics show a step; False where the run ended first."""
    path = run / "metrics.jsonl"
    while process.poll() is None:
        if path.exists() and any(line.get("step", -1) >= step for line in read_metrics(path)):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.005)
    assert process.returncode == 0, process.stdout.read()
    return False


@pytest.fixture(scope="module")
def unbroken(melodies, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    options = RunOptions(exact=True, workers=0, save_every=7, log_every=1)
    return mmpre.train(TONES, out=out, options=options, **numbers(melodies))


def test_a_run_learns_and_keeps_its_best_weights(unbroken):
    logged = lines(unbroken)
    train = [line["loss"] for line in logged if "loss" in line]
    assert len(train) == 60
    assert np.mean(train[-10:]) < 0.5 * np.mean(train[:10])
    held_out = [line["valid_loss"] for line in logged if "valid" in line]
    assert len(held_out) == 3
    best = mmpre.load(unbroken, best=True).checkpoint
    assert best.state["best"]["loss"] == min(held_out)


def test_the_share_that_a_pick_really_took_is_logged_in_every_step_and_shown(unbroken, capsys):
    shares = [line["picked"]["note"] for line in lines(unbroken) if "loss" in line]
    assert len(shares) == 60 and len(set(shares)) > 30
    # 4 to 11 notes, each picked with 0.3, and one of them where none is: 0.7^n of the rows
    expected = sum(0.3 * n + 0.7**n for n in range(4, 12)) / sum(range(4, 12))
    assert abs(np.mean(shares) - expected) < 0.02
    counts = {"tokens": 40, "picked:note": 10, "ordinary:note": 40, "picked:none": 0, "ordinary:none": 0}
    one = Step(0, "pitch", 1.5, {}, 1.0, 0.1, counts, [], False, [])
    assert one.picked == {"note": 0.25, "none": 0.0}
    with Progress(1, Path("run")) as progress:
        progress.say("a hole in cat[/dog] of runs/[a]")  # brackets are no markup
        progress.step(1, one, 100.0)
    assert "pitch 1.500  picked none 0.0 %, note 25.0 %  100 tokens/s" in capsys.readouterr().err


def test_a_run_killed_at_random_moments_and_resumed_with_other_workers_ends_bit_for_bit_alike(
    unbroken, melodies, tmp_path
):
    run, moments, workers = tmp_path / "killed", random.Random(5), iter([0, 2, 1, 3, 0, 1])
    process = start(run, melodies, "--workers", "2")
    kills = 0
    for step in sorted(moments.sample(range(1, 55), 4)):
        kills += kill_at(process, run, step)
        process = start(run, melodies, "--workers", str(next(workers)), resume=True)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert kills >= 3
    assert lines(run) == lines(unbroken)
    assert same_weights(run, unbroken)


@pytest.mark.fault("I3")
def test_a_signal_saves_at_the_steps_end_and_resuming_ends_alike(unbroken, melodies, tmp_path):
    run = tmp_path / "stopped"
    process = start(run, melodies, "--workers", "1")
    while not (run / "metrics.jsonl").exists() or not read_metrics(run / "metrics.jsonl"):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    assert f"mmpre resume {run}" in out
    mmpre.resume(run, workers=0)
    assert lines(run) == lines(unbroken)
    assert same_weights(run, unbroken)
    mmpre.resume(run)  # finished: says so and returns


@pytest.mark.fault("I11", "F8", "A14", "C9")
def test_other_data_and_changed_settings_are_refused_and_moved_shards_are_not(unbroken, melodies, tmp_path):
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in melodies.glob("*.tar"):
        (moved / path.name).write_bytes(path.read_bytes())
    mmpre.resume(unbroken, data=shards(moved, "train"), valid=shards(moved, "valid"))
    assert mmpre.load(unbroken).record["numbers"]["data"] == list(shards(moved, "train"))
    mmpre.resume(unbroken)  # which finds it where it was last
    with pytest.raises(RunError, match=r"the held-out data of stage 0 is not what .* began with"):
        mmpre.resume(unbroken, valid=shards(moved, "train"))
    with pytest.raises(RunError, match=r"200 samples .* then, 180 .* now"):
        mmpre.resume(unbroken, data=shards(moved, "train")[:2], valid=shards(moved, "valid"))
    with pytest.raises(RunError, match="seed would change the results"):
        mmpre.resume(unbroken, seed=4)
    with pytest.raises(RunError, match="threads would change the results"):
        mmpre.resume(unbroken, threads=2)
    with pytest.raises(RunError, match="already holds a run; continue it with `mmpre resume"):
        mmpre.train(TONES, out=unbroken, **numbers(melodies))


def test_the_same_shards_cut_into_other_rows_are_refused():
    was = {"fingerprint": "a" * 64, "samples": 9, "units": 30}
    check_data("the data", was, was, Path("run"))
    with pytest.raises(RunError, match=r"the data is what run began with, but is cut into 31 rows now and 30 then"):
        check_data("the data", was, was | {"units": 31}, Path("run"))
    with pytest.raises(RunError, match=r"the sidecar of the data is not the one that run began with"):
        check_data("the data", was | {"sidecars": ["a"]}, was | {"sidecars": ["b"]}, Path("run"))
    check_data("the data", was, was | {"sidecars": ["b"]}, Path("run"))  # a record of before they were looked at


@pytest.mark.fault("A18")
def test_too_few_samples_is_an_error_not_a_hang(melodies, tmp_path):
    with pytest.raises(ValueError, match="a step takes 500 rows, the data has 40 units"):
        mmpre.train(TONES, out=tmp_path / "few", data=shards(melodies, "valid"), batch=500)


@pytest.mark.fault("F1")
def test_a_loss_that_is_not_finite_skips_the_step_names_the_samples_and_then_stops(melodies, tmp_path):
    folder = tmp_path / "poisoned"
    folder.mkdir()
    with webdataset.ShardWriter(str(folder / "train-%03d.tar"), verbose=0) as sink:
        for i in range(64):
            sink.write({"__key__": f"m{i:02d}", "notes": b"1 2 3 4" if i != 5 else b"1 3e38 3 -3e38"})
    run = mmpre.train(
        TONES, out=tmp_path / "run", data=shards(folder, "train"), steps=12,
        options=RunOptions(workers=0, exact=True, log_every=1),
    )  # fmt: skip
    skipped = [line for line in lines(run) if line.get("skipped")]
    assert 1 <= len(skipped) <= 3
    assert all("m05" in line["keys"] for line in skipped)
    assert all(torch.isfinite(w).all() for w in weights(run).values())


def test_held_out_rows_that_cannot_be_read_are_told_and_are_no_best(melodies, tmp_path, capsys):
    with webdataset.ShardWriter(str(tmp_path / "empty-%03d.tar"), verbose=0) as sink:
        for i in range(12):
            sink.write({"__key__": f"e{i}", "other": b"x"})
    unread = {"valid": (str(tmp_path / "empty-000.tar"),)}
    run = mmpre.train(TONES, out=tmp_path / "run", options=RunOptions(workers=0), **numbers(melodies) | unread)
    assert "task pitch has no loss that is a number" in " ".join(capsys.readouterr().err.split())
    assert mmpre.load(run).checkpoint.state["best"] == {"step": None, "loss": None}
    assert all(line["valid_loss"] == "nan" for line in lines(run) if "valid" in line)


def test_the_record_tells_what_was_run(unbroken):
    record = json.loads((unbroken / "run.json").read_text())
    assert record["recipe"]["name"] == "tones"
    assert record["numbers"]["width"] == 32
    assert record["options"]["exact"] is True
    assert (unbroken / "recipe.py").read_text() == TONES.read_text()


def test_the_digest_of_the_code_is_of_all_of_the_core(tmp_path):
    core = tmp_path / "core"
    shutil.copytree(Path(mmpre.__file__).parent, core, ignore=shutil.ignore_patterns("__pycache__"))
    assert digest_of_code(core) == digest_of_code()
    with (core / "tokens.py").open("a") as file:
        file.write("# changed\n")
    assert digest_of_code(core) != digest_of_code()


def test_a_run_keeps_the_files_that_it_needs(tmp_path):
    from parity_text import some_samples, word_tokenizer

    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text(word_tokenizer().to_str())
    with webdataset.ShardWriter(str(tmp_path / "train-%03d.tar"), verbose=0) as sink:
        for sample in some_samples(24):
            sink.write({"__key__": sample.key, "txt": sample.members["txt"]})
    small = dict(width=16, depth=1, heads=2, length=16, batch=8, micro_batches=1, warmup=1, steps=3)
    data = {"data": shards(tmp_path, "train"), "tokenizer": str(tokenizer)}
    run = mmpre.train("bert", out=tmp_path / "run", options=RunOptions(workers=0), **small, **data)
    tokenizer.unlink()
    moved = run.rename(tmp_path / "elsewhere")
    loaded = mmpre.load(moved)
    assert loaded.recipe.network.readers["text"].vocabulary.size == 65
    mmpre.resume(moved, workers=0)
