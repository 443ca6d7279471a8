"""Signals in every phase, and resuming from every place."""

import json
import logging
import os
import shutil
import signal
import time

import pytest
from harness import lines, same, step_of
from runs import SAVE_EVERY, STEPS, resume, start

from mmpre.runs import checkpoint


def saving(run):
    return list((run / "checkpoints").glob(".tmp-*"))


def back(unbroken, copy, step):
    """A copy of the unbroken run as a process that was killed after `step` steps leaves it."""
    shutil.copytree(unbroken, copy)
    for path in (copy / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    return copy


@pytest.mark.fault("I1", "I8", "I12")
@pytest.mark.parametrize("step", [0, 5, 8, 20, STEPS])
def test_resuming_from_any_checkpoint_ends_alike(unbroken, tmp_path, step, capsys):
    run = back(unbroken, tmp_path / "run", step)
    resume(run)
    same(run, unbroken)
    resume(run)  # after the end: says so
    assert f"{run} is finished: nothing left to train" in capsys.readouterr().out
    same(run, unbroken)


@pytest.mark.slow
@pytest.mark.fault("I7")
def test_resuming_again_and_again_in_one_epoch_drifts_nowhere(melodies, unbroken, tmp_path):
    run = tmp_path / "often"
    for step in (0, 1, 2, 3, 4, 6):
        with start(run, melodies, "--save-every", 1, breaks="slow@*") as tree:
            assert tree.until(lambda step=step: step_of(run) >= step), tree.output
            tree.kill()
    resume(run, save_every=SAVE_EVERY)
    same(run, unbroken)
    assert len(json.loads((run / "run.json").read_text())["restarts"]) == 6


def ends(tree, run, unbroken):
    assert tree.wait(seconds=30) == 0, tree.output
    assert f"stopped and saved; go on with: mmpre resume {run}" in tree.output
    assert checkpoint.latest(run / "checkpoints").step == step_of(run) + 1
    assert step_of(run) < STEPS - 1
    resume(run)
    same(run, unbroken)


@pytest.mark.fault("I2")
def test_a_signal_to_the_first_process_alone_stops_all_at_one_step(melodies, unbroken, tmp_path):
    run = tmp_path / "first"
    with start(run, melodies, breaks="slow@*", processes=2) as tree:
        assert tree.until(lambda: step_of(run) >= 3), tree.output
        owner = json.loads((run / "lock").read_text())["pid"]
        os.kill(owner, signal.SIGTERM)
        ends(tree, run, unbroken)


@pytest.mark.fault("I3", "I5")
def test_signals_to_the_group_while_saving_leave_a_whole_checkpoint(melodies, unbroken, tmp_path):
    run = tmp_path / "group"
    with start(run, melodies, breaks="slow-save@0", workers=1) as tree:
        assert tree.until(lambda: saving(run)), tree.output
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):  # the trainer and its worker, again and again
            tree.kill(number)
            time.sleep(0.1)
        ends(tree, run, unbroken)


@pytest.mark.slow
@pytest.mark.fault("I3")
def test_a_signal_to_agent_processes_and_workers_saves_as_well(melodies, unbroken, tmp_path):
    run = tmp_path / "agent"
    with start(run, melodies, breaks="slow@*", processes=2, workers=1) as tree:
        assert tree.until(lambda: step_of(run) >= 3), tree.output
        tree.kill(signal.SIGTERM)
        tree.wait(seconds=40)  # torchrun's own code is not 0
    assert f"stopped and saved; go on with: mmpre resume {run}" in tree.output
    resume(run)
    same(run, unbroken)


@pytest.mark.fault("I4", "I12")
def test_a_signal_during_the_held_out_loss_is_not_kept_waiting_and_the_loss_is_taken_later(
    melodies, unbroken, tmp_path
):
    run = tmp_path / "held-out"
    with start(run, melodies, breaks="slow-held-out@0") as tree:
        assert tree.until(lambda: step_of(run) >= 7), tree.output
        time.sleep(0.3)
        tree.kill(signal.SIGTERM)
        assert tree.wait(seconds=30) == 0, tree.output
    assert step_of(run) == 7
    assert not [line for line in lines(run) if "valid" in line]
    assert checkpoint.latest(run / "checkpoints").state["held_out_due"] is True
    resume(run)
    same(run, unbroken)


@pytest.mark.slow
@pytest.mark.fault("I4")
@pytest.mark.parametrize("when", ["start", "first step"])
def test_a_signal_before_anything_is_done_ends_it_at_once_and_harms_nothing(melodies, unbroken, tmp_path, when):
    run = tmp_path / "early"
    with start(run, melodies, breaks="slow-start@0 slow@0") as tree:
        if when == "start":
            time.sleep(1.0)
        else:
            assert tree.until(lambda: (run / "run.json").exists()), tree.output
        tree.kill(signal.SIGTERM)
        assert tree.wait(seconds=20) in (0, -signal.SIGTERM), tree.output
    with start(run, melodies) as tree:
        assert tree.wait(seconds=60) == 0, tree.output
    same(run, unbroken)


@pytest.mark.slow
@pytest.mark.fault("I6", "D1")
def test_a_kill_in_the_midst_of_the_last_save_leaves_the_one_before(melodies, unbroken, tmp_path):
    run = tmp_path / "short"
    with start(run, melodies, breaks="slow-save@0 slow@*") as tree:
        assert tree.until(lambda: step_of(run) >= SAVE_EVERY + 1), tree.output
        tree.kill(signal.SIGTERM)
        assert tree.until(lambda: saving(run)), tree.output
        tree.kill(signal.SIGKILL)
    assert checkpoint.latest(run / "checkpoints").step == SAVE_EVERY
    resume(run)
    assert not saving(run)
    same(run, unbroken)


@pytest.mark.fault("I10")
def test_changed_packages_are_told_and_harm_nothing(unbroken, tmp_path, caplog):
    run = back(unbroken, tmp_path / "run", 20)
    record = json.loads((run / "run.json").read_text())
    record["environment"]["torch"] = "1.0.0"
    (run / "run.json").write_text(json.dumps(record))
    with caplog.at_level(logging.WARNING):
        resume(run)
    assert "torch was 1.0.0 when" in caplog.text
    assert "the order of the data stays the same" in caplog.text
    assert json.loads((run / "run.json").read_text())["restarts"][0]["environment"]["torch"] != "1.0.0"
    same(run, unbroken)


def test_what_came_of_a_run_is_told_and_written_down(unbroken, tmp_path, capsys):
    run = back(unbroken, tmp_path / "run", 20)
    resume(run)
    outcome = json.loads((run / "run.json").read_text())["outcome"]
    assert outcome["finished"] is True
    assert (outcome["step"], outcome["rows"], outcome["restarts"], outcome["skipped_steps"]) == (
        STEPS,
        STEPS * 16,
        1,
        0,
    )
    assert outcome["holes"] == {"checksum": sum(outcome["holes"].values())}
    assert outcome["ledger"] == str(run / "ledger.jsonl")
    told = capsys.readouterr().err
    assert "0 steps skipped; 1 restarts; " in told
    assert "ledger.jsonl names the holes" in told.replace("\n", "")
