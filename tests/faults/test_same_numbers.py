"""What `mmpre eval` says follows from the weights, however many processes trained and saved them."""

import io
import json
import shutil
import signal

import numpy as np
import pytest
import torch
from harness import mmpre, step_of
from PIL import Image

import mmpre as library
from mmpre.data.shards import shard_writer
from mmpre.evaluation.evaluate import evaluate
from mmpre.runs.checkpoint import load, path_of, save
from mmpre.runs.options import RunOptions

STEPS = 24
NUMBERS = dict(
    modality="image_patches", patch_px=8, width=16, depth=2, heads=2, batch=8, micro_batches=2, warmup=2, steps=STEPS
)
ABOUT = {"about": "grey", "input": "png", "target": "cls"}
TASKS = [{"kind": kind, "epochs": 1} | ABOUT for kind in ("classification", "few-shot", "fine-tuning")]
TASKS.append({"kind": "retrieval", "about": "as grey", "input": "png", "target": "png", "group": "cls"})


def picture(i):
    file, noise_HW3 = io.BytesIO(), np.random.default_rng(i).integers(0, 200, (16, 16, 3))
    Image.fromarray((noise_HW3 + i % 3 * 25).astype(np.uint8)).save(file, "PNG")
    return {"__key__": f"{i:03d}", "png": file.getvalue(), "cls": str(i % 3)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("greys")
    for split, count in (("train", 48), ("valid", 24), ("test", 30)):
        with shard_writer(folder / split, prefix=split) as sink:
            for i in range(count):
                sink.write(picture(i))
    (folder / "card.json").write_text(json.dumps({"name": "greys", "tasks": TASKS}))
    return {split: (str(folder / name),) for split, name in (("data", "train"), ("valid", "valid"))}


def start(run, data, *options, processes):
    words = [word for name, value in NUMBERS.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += [word for name, value in data.items() for word in (f"--{name}", *value)]
    words = ["train", "masked", "--out", run, *words, "--log-every", 1, "--save-every", 4, "--threads", 1, *options]
    return mmpre(*words, log=run.with_suffix(".log"), processes=processes)


def measured(run):
    answer = evaluate(run)
    assert not answer.get("not measured")
    names = [one["name"] for one in answer["trained"]["results"]]
    assert any("fine-tuned" in name for name in names) and any("linear probe" in name for name in names)
    return {name: answer[name] for name in ("trained", "untrained", "gain", "step")}


@pytest.mark.fault("D1")
def test_a_killed_run_that_goes_on_with_other_processes_is_measured_like_the_unbroken_one(data, tmp_path):
    options = RunOptions(exact=True, workers=0, threads=1, save_every=4, log_every=1)
    whole = library.train("masked", out=tmp_path / "whole", options=options, **NUMBERS, **data)
    run = tmp_path / "killed"
    with start(run, data, "--exact", "--workers", 1, processes=2) as tree:
        assert tree.until(lambda: step_of(run) >= 6), tree.output
        tree.kill(signal.SIGKILL)
    assert step_of(run) < STEPS
    with mmpre("resume", run, "--workers", 0, log=run.with_suffix(".log")) as tree:
        assert tree.wait() == 0, tree.output
    assert measured(run) == measured(whole)


def test_weights_that_two_processes_shared_out_and_saved_are_measured_like_those_that_one_saved(data, tmp_path):
    shared = tmp_path / "shared"
    with start(shared, data, "--parallel", "fsdp", "--workers", 0, processes=2) as tree:
        assert tree.wait() == 0, tree.output
    opened = library.load(shared)
    module, before = opened.recipe.module(), opened.checkpoint
    alone = shutil.copytree(shared, tmp_path / "alone")
    shutil.rmtree(alone / "checkpoints")
    weights = module.state_dict()
    save(alone / "checkpoints", before.step, {**before.tensors, "model": weights}, before.state)
    one = load(path_of(alone / "checkpoints", STEPS)).tensors["model"]
    assert one.keys() == before.tensors["model"].keys()
    assert all(torch.equal(tensor, one[name]) for name, tensor in before.tensors["model"].items())
    assert measured(alone) == measured(shared)
    # and they are those of a run by one process, but for rounding
    options = RunOptions(workers=0, threads=1)
    run = library.train("masked", out=tmp_path / "one", options=options, **NUMBERS, **data)
    for name, tensor in library.load(run).recipe.module().state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-4, rtol=1e-3, msg=name)
