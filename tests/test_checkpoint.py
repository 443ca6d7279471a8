"""Checkpoints: whole or not there, damage is always found, and nothing is lost by a failed save."""

import json
import os
import pickle
import random
import shutil
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from mmpre.runs import checkpoint
from mmpre.runs.checkpoint import CheckpointError


def network(seed=0, width=16):
    torch.manual_seed(seed)
    one = nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8))
    one.add_module("tied", nn.Linear(width, 8))
    one.tied.weight = one[2].weight
    return one


def trained(module, kind=torch.optim.AdamW, **numbers):
    optimizer = kind(module.parameters(), lr=1e-2, **numbers)
    step(module, optimizer)
    return optimizer


def step(module, optimizer):
    optimizer.zero_grad()
    x = torch.linspace(-1, 1, 24).view(3, 8)
    (module[2](module[1](module[0](x))) + module.tied(module[0](x))).square().sum().backward()
    optimizer.step()


def save(folder, number, module, optimizer=None, **more):
    tensors, meta = checkpoint.flatten_optimizer(optimizer, module) if optimizer else ({}, {})
    files = {"model": module.state_dict(), "optimizer": tensors}
    return checkpoint.save(folder, number, files, {"step": number, "optimizer": meta}, **more)


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path):
    module = network()
    path = save(tmp_path, 3, module)
    found = checkpoint.load(path)
    assert found.aliases["model"] == {"tied.weight": "2.weight"}
    other = network(seed=1)
    checkpoint.restore_model(other, found.tensors["model"])
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    assert other.tied.weight is other[2].weight
    assert sorted(found.tensors) == ["model", "optimizer"] and len(found.tensors) == 2
    (path / "optimizer.safetensors").unlink()  # nobody has asked for it yet
    with pytest.raises(FileNotFoundError):
        found.tensors["optimizer"]


@pytest.mark.parametrize(
    ("kind", "numbers"), [(torch.optim.AdamW, {"fused": True}), (torch.optim.SGD, {"momentum": 0.9})]
)
def test_the_next_step_after_a_restore_is_bit_for_bit_the_same(tmp_path, kind, numbers):
    module = network()
    optimizer = trained(module, kind, **numbers)
    found = checkpoint.load(save(tmp_path, 1, module, optimizer))
    other = network(seed=1)
    again = kind(other.parameters(), lr=1e-2, **numbers)
    checkpoint.restore_model(other, found.tensors["model"])
    checkpoint.restore_optimizer(again, other, found.tensors["optimizer"], found.state["optimizer"])
    for _ in range(3):
        step(module, optimizer)
        step(other, again)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


@pytest.mark.fault("D3")
def test_every_flipped_bit_is_found_and_the_checkpoint_before_is_taken(tmp_path, caplog):
    module = network()
    save(tmp_path, 1, module, trained(module))
    path = save(tmp_path, 2, module, trained(module))
    dice = random.Random(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for _ in range(25):
            place = dice.randrange(len(whole))
            broken = bytearray(whole)
            broken[place] ^= 1 << dice.randrange(8)
            file.write_bytes(broken)
            assert checkpoint.latest(tmp_path).step == 1, (file.name, place)
        file.write_bytes(whole)
    assert checkpoint.latest(tmp_path).step == 2
    assert "trying the one before it" in caplog.text


@pytest.mark.fault("D4")
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"])
def test_a_missing_or_cut_file_is_named(tmp_path, name):
    module = network()
    path = save(tmp_path, 1, module, trained(module))
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[:-3])
    with pytest.raises(CheckpointError, match=r"bytes, its manifest says|no valid manifest"):
        checkpoint.load(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=r"is missing|cannot be read"):
        checkpoint.load(path)


@pytest.mark.fault("D13", "G10")
def test_a_manifest_cannot_lead_out_of_its_folder_and_no_pickle_is_read(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "marker"),)

    path = save(tmp_path / "run", 1, network())
    (path / "model.pt").write_bytes(pickle.dumps(Payload()))
    assert checkpoint.load(path).step == 1
    whole = json.loads((path / "MANIFEST.json").read_text())
    for stem in ("../model", "/etc/x", "a b"):
        manifest = whole["manifest"] | {"aliases": {stem: {}}, "files": {}}
        manifest["files"] = {"state.json": whole["manifest"]["files"]["state.json"], f"{stem}.safetensors": {"size": 1}}
        forged = {"manifest": manifest, "blake2b": checkpoint._digest_of(manifest)}
        (path / "MANIFEST.json").write_text(json.dumps(forged))
        with pytest.raises(CheckpointError, match="which may not be"):
            checkpoint.load(path)
    assert not (tmp_path / "marker").exists()


def test_a_file_that_the_disk_changed_while_it_was_written_is_found_and_nothing_is_deleted(tmp_path, monkeypatch):
    module = network()
    save(tmp_path, 1, module, keep=1)
    sync = os.fsync

    def changing(handle):
        sync(handle)
        if stat.S_ISREG(os.fstat(handle).st_mode) and os.fstat(handle).st_size > 1000:
            with open(f"/proc/self/fd/{handle}", "r+b") as file:
                file.seek(900)
                file.write(b"\x55\xaa")

    monkeypatch.setattr(os, "fsync", changing)
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit its digest: damaged"):
        save(tmp_path, 2, module, keep=1)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path).step == 1


def test_parameters_that_lie_in_one_storage_are_saved_each_by_itself(tmp_path):
    whole = torch.arange(12.0)
    tensors = {"all": whole, "rows": whole.view(3, 4), "part": whole[3:7], "turned": whole.view(3, 4).T}
    found = checkpoint.load(checkpoint.save(tmp_path, 1, {"model": tensors}, {})).tensors["model"]
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], one) for name, one in tensors.items())


@pytest.mark.fault("D12")
def test_another_format_is_refused_with_both_numbers(tmp_path):
    path = save(tmp_path, 1, network())
    manifest = json.loads((path / "MANIFEST.json").read_text())["manifest"] | {"format": 99}
    forged = {"manifest": manifest, "blake2b": checkpoint._digest_of(manifest)}
    (path / "MANIFEST.json").write_text(json.dumps(forged))
    with pytest.raises(CheckpointError, match="has format 99, this version of mmpre reads 1"):
        checkpoint.load(path)


@pytest.mark.fault("D10")
def test_retention_keeps_the_newest_valid_ones_and_the_protected(tmp_path):
    module = network()
    for number in range(1, 5):
        path = save(tmp_path, number, module, keep=2, protect={1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000003", "step-00000004"]
    (path / "model.safetensors").write_bytes(b"gone")
    save(tmp_path, 5, module, keep=2, protect={1})
    assert checkpoint.load(tmp_path / "step-00000003").step == 3  # 4 is damaged and does not count


@pytest.mark.fault("D6")
def test_a_full_disk_is_told_beforehand_and_harms_nothing(tmp_path, monkeypatch):
    save(tmp_path, 1, network())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, 1,000 are free; make room"):
        save(tmp_path, 2, network())
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


SAVER = """
import resource, signal, sys, torch
from pathlib import Path
from mmpre.runs import checkpoint
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
number = int(sys.argv[3])
while True:
    number += 1
    try:
        checkpoint.save(folder, number, {"model": {"w": torch.full((300_000,), float(number))}}, {"n": number})
    except checkpoint.CheckpointError as e:
        print(e); sys.exit(3)
    print(number, flush=True)
"""


def test_a_save_that_hits_the_disks_limit_leaves_the_old_one(tmp_path):
    checkpoint.save(tmp_path, 1, {"model": {"w": torch.ones(300_000)}}, {})
    done = subprocess.run(
        [sys.executable, "-c", SAVER, str(tmp_path), "100000", "1"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 3, done.stderr
    assert "step 2 was not saved" in done.stdout
    assert checkpoint.latest(tmp_path).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


@pytest.mark.fault("D1")
def test_killed_at_random_moments_a_save_is_whole_or_not_there(tmp_path):
    dice, saved = random.Random(1), 0
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(tmp_path), "0", str(saved)], stdout=subprocess.PIPE, text=True
        )
        first = process.stdout.readline()
        assert first
        time.sleep(dice.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        saved = max([int(first), *map(int, process.stdout.read().split())])
        process.wait()
        found = checkpoint.latest(tmp_path)
        assert found.step >= saved
        assert (found.tensors["model"]["w"] == float(found.step)).all()
        saved = found.step
    checkpoint.sweep(tmp_path)
    assert all(p.name.startswith("step-") for p in tmp_path.iterdir())


def test_weights_that_do_not_fit_are_told_with_the_nearest_name_and_nothing_is_loaded():
    module, other = network(), network(seed=1, width=20)
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(CheckpointError, match=r"0.weight has shape \[20, 8\], the model's \[16, 8\].*; build it as"):
        checkpoint.restore_model(module, other.state_dict())
    renamed = {name.replace("0.weight", "0.wieght"): t for name, t in module.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"0.weight is missing \(is it 0.wieght\?\); 0.wieght is not in the model"
    ):
        checkpoint.restore_model(module, renamed)
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (False, "cpu")])
def test_a_step_counter_goes_where_its_optimizer_makes_it(fused, device):
    """Torch's fused optimizers want it beside the parameter, which a graphics card's is not on the CPU."""
    module = nn.Linear(2, 2, bias=False, device="meta")
    optimizer = torch.optim.AdamW(module.parameters())
    optimizer.defaults["fused"] = fused
    tensors = {"weight/step": torch.tensor(3.0), "weight/exp_avg": torch.zeros(2, 2)}
    checkpoint.restore_optimizer(optimizer, module, tensors, {"tensors": 2, "plain": {}})
    state = optimizer.state[module.weight]
    assert (state["step"].device.type, state["exp_avg"].device.type) == (device, "meta")


def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, monkeypatch):
    module = network()
    optimizer = trained(module, torch.optim.SGD)
    for number in (1, 2):
        save(tmp_path, number, module, optimizer)

    def broken(path, name, about):
        if path.name.endswith("2"):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint, "_verify", broken)
    assert checkpoint.latest(tmp_path).step == 1
    with pytest.raises(checkpoint.CheckpointError, match=r"step-00000002 cannot be read \(Input/output error\)"):
        checkpoint.load(checkpoint.path_of(tmp_path, 2))
