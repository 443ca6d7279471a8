"""Losses and gradients that are no numbers, spikes, and batches that have nothing to predict."""

import math

import pytest
import torch
from harness import lines, same
from runs import broken, resume, start, train

import mmpre as library
from mmpre.command_line.cli import main
from mmpre.runs import checkpoint
from mmpre.runs.replay import replay
from mmpre.runs.run import RunError
from mmpre.training.guard import SpikeGuard
from mmpre.training.loop import NonFiniteError


def skipped(run):
    return [line for line in lines(run) if line.get("skipped")]


@pytest.mark.fault("F1")
def test_a_nan_on_one_process_skips_the_step_on_all_and_names_its_samples(melodies, tmp_path):
    run = tmp_path / "nan"
    with start(run, melodies, breaks="nan@5/1 nan@11/1", processes=2) as tree:
        assert tree.wait(seconds=60) == 0, tree.output
    alone = train(tmp_path / "alone", melodies)
    whole = {line["step"]: line for line in lines(alone) if "loss" in line}
    assert [line["step"] for line in skipped(run)] == [5, 11]
    for line in skipped(run):
        assert line["cause"].startswith("loss note of micro-batch 1 is not finite; gradient of ")
        assert len(line["keys"]) < whole[line["step"]]["rows"]  # those of the one micro-batch
    assert "step 5 was skipped: loss note of micro-batch 1 is not finite" in tree.output
    assert "2 steps skipped" in tree.output
    assert lines(run)[:5] == lines(alone)[:5]
    assert all(torch.isfinite(w).all() for w in library.load(run).recipe.module().state_dict().values())


@pytest.mark.fault("F2")
def test_an_infinite_gradient_names_the_branch(melodies, tmp_path):
    run = train(tmp_path / "inf", melodies, "inf-gradient@5")
    (line,) = skipped(run)
    assert line["step"] == 5
    assert line["cause"] == "gradient of tasks.pitch.branch.weight is not finite"


@pytest.mark.fault("F3")
def test_a_spike_is_skipped_where_that_is_asked_for_and_the_window_is_in_the_checkpoint(melodies, tmp_path):
    plain = train(tmp_path / "plain", melodies, "spike@20")
    assert not skipped(plain)
    run = train(tmp_path / "guarded", melodies, "spike@20", spike=12.0, keep=100)
    (line,) = skipped(run)
    assert line["step"] == 20
    assert "is a spike: the median of 20 before is" in line["cause"]
    again = tmp_path / "again"
    forget(run, again, after=15)  # a new process, whose window comes from the checkpoint
    resume(again, "spike@20")
    same(again, run)


def forget(run, copy, *, after):
    """A copy of a run as it was when its checkpoint of step `after` was the newest."""
    import shutil

    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > after:
            shutil.rmtree(path)


@pytest.mark.fault("F3", "F4")
def test_a_nan_costs_one_step_and_never_enters_the_window():
    guard = SpikeGuard(8.0)
    refused = []
    for step in range(260):
        loss = math.nan if step == 50 else 300.0 if step == 60 else 3.0 + 0.1 * math.sin(step)
        if guard.refuses("task", {"loss": loss, "gradient norm": 1.0}):
            refused.append(step)
    assert refused == [60]
    other = SpikeGuard(8.0)
    other.load_state(guard.state())
    assert other.refuses("task", {"loss": 5.0, "gradient norm": 1.0}).startswith("loss 5 is a spike: the median of 128")
    assert not other.refuses("another task", {"loss": 5.0, "gradient norm": 1.0})


@pytest.mark.fault("F1", "F5")
def test_a_run_that_stays_broken_stops_with_the_weights_from_before(melodies, tmp_path):
    run = tmp_path / "lost"
    breaks = " ".join(f"nan@{step}" for step in range(7, 24))
    with pytest.raises(NonFiniteError, match=r"4 steps in a row \(up to step 10, task pitch\).*the last: loss note of"):
        train(run, melodies, breaks, max_skipped=3, save_every=1)
    assert [line["step"] for line in skipped(run)] == [7, 8, 9, 10]
    whole = train(tmp_path / "whole", melodies, save_every=1, keep=100)
    kept = checkpoint.load(checkpoint.path_of(whole / "checkpoints", 7)).tensors["model"]
    now = library.load(run).checkpoint.tensors["model"]
    assert all(torch.equal(now[name], kept[name]) for name in kept)


@pytest.mark.fault("F9")
def test_a_step_is_done_again_bit_for_bit(melodies, unbroken, tmp_path, capsys):
    for step, begun in ((3, 0), (5, 5), (13, 10)):
        told = replay(unbroken, step)
        assert told["same"] is True, told
        assert told["from"] == begun
        assert len(told["keys"]) == 16
        assert told["keys"][0].startswith("train-")
    run = train(tmp_path / "nan", melodies, "nan@5", keep=100)
    healthy = replay(run, 5)  # the machine's fault, then: this time it is a number
    assert healthy["same"] is False
    assert math.isfinite(healthy["now"]["loss"])
    with broken("nan@5"):
        assert replay(run, 5)["same"] is True
    with pytest.raises(RunError, match="has no step 24; its steps are 0 to 23"):
        replay(unbroken, 24)
    with pytest.raises(SystemExit) as ended:
        main(["replay", str(run), "--step", "5"])
    assert ended.value.code == 1
    assert "step 5, task pitch, from step 5: NOT as logged" in capsys.readouterr().out


@pytest.mark.fault("F6")
def test_a_step_with_nothing_to_predict_has_loss_zero_and_goes_on(melodies, tmp_path):
    run = train(tmp_path / "nothing", melodies, "nothing-picked@5 nothing-picked@6")
    logged = [line for line in lines(run) if "loss" in line]
    assert logged[5]["note"] == logged[6]["note"] == 0.0
    assert all(math.isfinite(line["loss"]) and not line.get("skipped") for line in logged)
    with start(tmp_path / "two", melodies, breaks="nothing-picked@5 nothing-picked@6", processes=2) as tree:
        assert tree.wait(seconds=60) == 0, tree.output
    same(tmp_path / "two", run)
