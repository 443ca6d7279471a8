"""Runs that are killed anywhere and go on as other topologies end bit for bit like the unbroken run."""

import random
import shutil
import signal
from pathlib import Path

import pytest
from cases import CASES, STEPS, flags
from harness import lines, mmpre, same, step_of

import mmpre as library
from mmpre.runs.options import RunOptions

SAVE_EVERY = 5


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A case, its shards, and its unbroken run alone and without workers."""
    one = CASES[request.param]
    folder = tmp_path_factory.mktemp(one.name)
    shards = one.make(folder / "shards")
    options = RunOptions(exact=True, workers=0, threads=1, save_every=SAVE_EVERY, log_every=1)
    unbroken = library.train(one.recipe, out=folder / "unbroken", options=options, **one.numbers, **shards)
    return one, shards, unbroken


def start(case, run: Path, *, processes: int, workers: int):
    """Train, or resume where there is a run already."""
    one, shards, _ = case
    words = ["train", one.recipe, "--out", run, "--save-every", SAVE_EVERY, *flags(one, shards)]
    if (run / "run.json").exists():
        words = ["resume", run]
    return mmpre(*words, "--workers", workers, processes=processes, log=run.with_suffix(".log"))


def test_the_unbroken_run_learns_and_meets_holes(case):
    _, _, unbroken = case
    losses = [line["loss"] for line in lines(unbroken) if "loss" in line]
    assert len(losses) == STEPS
    assert sum(losses[-6:]) < sum(losses[:6])
    assert (unbroken / "ledger.jsonl").read_text().count("train0007") >= 2


SHAPES = {  # processes and loading workers of each start; every start but the last is killed
    "bert": [(2, 1), (1, 2), (2, 0)],
    "electra": [(2, 1), (1, 0)],
    "mirror_bert": [(1, 1), (2, 0)],
    "uniter": [(1, 1), (2, 1), (1, 0)],
    "contrastive": [(2, 1), (1, 0)],
    "two_stages": [(1, 1), (2, 0)],
}


@pytest.mark.fault("D1", "D11", "I1", "I9")
def test_killed_at_random_steps_and_resumed_in_other_shapes_it_ends_alike(case, tmp_path):
    run, dice = tmp_path / "killed", random.Random(case[0].name)
    *killed, (processes, workers) = SHAPES[case[0].name]
    for number, shape in enumerate(killed):
        step = dice.randrange(STEPS * number // len(killed) + 2, STEPS * (number + 1) // len(killed) - 2)
        with start(case, run, processes=shape[0], workers=shape[1]) as tree:
            assert tree.until(lambda step=step: step_of(run) >= step), tree.output
            tree.kill(signal.SIGKILL)
    with start(case, run, processes=processes, workers=workers) as tree:
        assert tree.wait() == 0, tree.output
    same(run, case[2])


@pytest.mark.parametrize("case", ["two_stages"], indirect=True)
def test_resumed_where_a_stage_ended_or_just_after_it_ends_alike(case, tmp_path):
    one, shards, unbroken = case
    options = RunOptions(exact=True, workers=0, threads=1, save_every=SAVE_EVERY, log_every=1, keep=99)
    run = library.train(one.recipe, out=tmp_path / "run", options=options, **one.numbers, **shards)
    for step in (STEPS // 2 + 2, STEPS // 2):
        for path in (run / "checkpoints").glob("step-*"):
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        library.resume(run)
        same(run, unbroken)
