"""Checkpoints that cannot be written or used: the run tells, and goes on or stops with a good one."""

import json
import resource
import shutil

import pytest
import torch
from harness import same, step_of
from runs import resume, start, train

from mmpre.runs import checkpoint
from mmpre.runs.checkpoint import CheckpointError
from mmpre.runs.leg import SaveError


def forge(path, change):
    """Change a checkpoint's state and tensors so that every digest fits: what a person or another version may do."""
    found = checkpoint.load(path)
    state, tensors = json.loads(json.dumps(found.state)), {name: dict(one) for name, one in found.tensors.items()}
    change(state, tensors)
    step, folder = found.step, path.parent
    shutil.rmtree(path)
    checkpoint.save(folder, step, tensors, state, keep=100)


@pytest.fixture
def run(unbroken, tmp_path):
    return shutil.copytree(unbroken, tmp_path / "run")


@pytest.mark.fault("D2", "D5")
def test_leftovers_are_swept_and_an_empty_newer_folder_is_passed_over(run, unbroken):
    folder = run / "checkpoints"
    shutil.rmtree(checkpoint.path_of(folder, 24))
    (folder / "step-00000099").mkdir()
    for name in (".tmp-9-ab", ".del-step-00000003-cd"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"half")
    resume(run)
    assert not list(folder.glob(".*"))
    same_but_for_the_empty_one = sorted(path.name for path in folder.glob("step-*"))[-1]
    assert same_but_for_the_empty_one == "step-00000099"
    (folder / "step-00000099").rmdir()
    same(run, unbroken)


@pytest.mark.fault("D3")
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again_in_silence(run):
    for path in (run / "checkpoints").glob("step-*"):
        (path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"none of the \d+ checkpoints in .* is whole; put one back from a copy"):
        resume(run)


@pytest.mark.fault("D6")
def test_a_full_disk_is_told_training_goes_on_and_stops_at_the_limit(melodies, unbroken, tmp_path):
    run = tmp_path / "full"
    words = ["--save-every", 2, "--max-unsaved", 2]
    with start(run, melodies, *words, breaks="slow@*") as tree:
        assert tree.until(lambda: step_of(run) >= 3), tree.output
        resource.prlimit(tree.process.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
        assert tree.wait(seconds=60) == 2, tree.output
    assert tree.output.count("training goes on, 2 may fail in a row") == 2
    assert "3 saves in a row have failed. Make room, then" in tree.output
    assert "older checkpoints are untouched" in tree.output
    good = checkpoint.latest(run / "checkpoints")
    assert good.step in (2, 4)
    assert step_of(run) > good.step + 3
    resume(run, save_every=5)
    same(run, unbroken)


@pytest.mark.fault("D6", "D7")
def test_one_failed_save_is_survived_but_the_last_must_succeed(melodies, unbroken, tmp_path, capsys):
    run = train(tmp_path / "one", melodies, "save-fails@10")
    told = capsys.readouterr().err.replace("\n", " ")
    assert "checkpoint at step 10 was not written: MemoryError: no memory for this save; training goes on" in told
    same(run, unbroken)
    with pytest.raises(SaveError, match=r"step 24 was not written: MemoryError.*; the run ends here. Make room"):
        train(tmp_path / "last", melodies, "save-fails@24")
    resume(tmp_path / "last")
    same(tmp_path / "last", unbroken)


@pytest.mark.fault("D6")
def test_the_best_weights_are_ones_that_were_saved(melodies, tmp_path):
    run = train(tmp_path / "best", melodies, "save-fails@16", save_every=2, keep=100)  # held-out losses at 8, 16, 24
    saved = [checkpoint.load(path) for path in sorted((run / "checkpoints").glob("step-*"))]
    steps = {one.step for one in saved}
    assert 8 in steps and 16 not in steps and {18, 20, 22} <= steps
    assert {one.state["best"]["step"] for one in saved} - {None} <= steps
    assert checkpoint.of_run(run, best=True).step in steps


@pytest.mark.slow
@pytest.mark.fault("D7")
def test_a_save_that_fails_on_the_process_that_writes_is_known_to_all(melodies, unbroken, tmp_path):
    run = tmp_path / "two"
    with start(run, melodies, breaks="save-fails@10 save-fails@15", processes=2) as tree:
        assert tree.wait(seconds=60) == 0, tree.output
    same(run, unbroken)


@pytest.mark.fault("D10")
def test_with_one_to_keep_there_is_a_good_one_at_every_moment(tmp_path, monkeypatch):
    tensors = {"model": {"w": torch.ones(8)}}
    checkpoint.save(tmp_path, 1, tensors, {}, keep=1)
    removed = []

    def watch(path, **more):
        removed.append((path, [one.step for one in map(checkpoint.load, checkpoint._steps(tmp_path))]))
        return rmtree(path, **more)

    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", watch)
    checkpoint.save(tmp_path, 2, tensors, {}, keep=1)
    checkpoint.save(tmp_path, 2, tensors, {}, keep=1)  # the same step again
    assert removed
    assert all(good for _, good in removed)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


@pytest.mark.fault("D14")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, tensors: state.pop("ledger"), "lacks ledger, without which the run would go on differently"),
        (lambda state, tensors: state.pop("guard"), "lacks guard"),
        (lambda state, tensors: tensors.pop("optimizer"), "lacks optimizer"),
        (lambda state, tensors: tensors["optimizer"].popitem(), r"has \d+ tensors, \d+ when it was saved"),
        (lambda state, tensors: tensors["model"].popitem(), "the checkpoint does not fit the model: .* is missing"),
    ],
)
def test_an_absent_part_of_the_state_is_an_error(run, change, message):
    path = checkpoint.path_of(run / "checkpoints", 20)
    shutil.rmtree(checkpoint.path_of(run / "checkpoints", 24))
    forge(path, change)
    with pytest.raises(CheckpointError, match=message):
        resume(run)


@pytest.mark.fault("D15")
def test_loaded_tensors_can_be_saved_over_their_own_file(tmp_path):
    one = torch.arange(6.0)
    tensors = {"model": {"a": one, "tied": one, "rows": torch.ones(100, 100)}}
    checkpoint.save(tmp_path, 1, tensors, {"n": 1})
    loaded = checkpoint.load(checkpoint.path_of(tmp_path, 1)).tensors
    checkpoint.save(tmp_path, 1, loaded, {"n": 2})
    again = checkpoint.load(checkpoint.path_of(tmp_path, 1))
    assert again.state == {"n": 2}
    assert again.aliases["model"] == {"tied": "a"}
    assert all(torch.equal(again.tensors["model"][name], tensors["model"][name]) for name in tensors["model"])
