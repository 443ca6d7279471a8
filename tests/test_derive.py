"""Sidecars of what frozen networks make of samples: joined by digest and key, resumed, shared by processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import mmpre
from mmpre.command_line.cli import main
from mmpre.data.derive import DeriveError, Deriver, derive
from mmpre.data.index import open_shards
from mmpre.data.sample import BadMember
from mmpre.data.shards import CorruptSample, ShardReader, Sidecar, shard_writer
from mmpre.derivers import from_run
from mmpre.runs.options import RunOptions
from mmpre.runs.states import StatesError

TONES = Path(__file__).parent / "tones.py"
COUNTING = '''
"""Sums of melodies; says on standard error how many it was asked for."""
import sys, time
import torch

def derive(samples):
    time.sleep(0.05)
    print("asked", *(sample.key for sample in samples), file=sys.stderr, flush=True)
    return [{"sum": torch.tensor([sum(map(float, sample.text(("notes",)).split()))])} for sample in samples]
'''


@pytest.fixture
def shards(tmp_path):
    """Three shards with names that no counter gives, of ten melodies each."""
    for name in ("x", "y-1", "z.b"):
        with shard_writer(tmp_path / "made") as sink:
            for i in range(10):
                sink.write({"__key__": f"{name[0]}{i}", "notes": f"{i} {i + 1} 2"})
        (tmp_path / "shards").mkdir(exist_ok=True)
        sink.paths[0].rename(tmp_path / "shards" / f"{name}.tar")
        sink.paths[0].with_name(f"{sink.paths[0].name}.idx").unlink()
    return tmp_path / "shards"


def sums(samples):
    return [{"sum": torch.tensor([sum(map(float, sample.text(("notes",)).split()))])} for sample in samples]


def values(shards, folder):
    opened = open_shards(shards)
    sidecar, found = Sidecar(folder, opened), {}
    for i in range(len(opened)):
        try:
            found[opened.key(i)] = safetensors.torch.load(sidecar.read(i)["derived.safetensors"])["sum"].item()
        except CorruptSample as e:
            found[opened.key(i)] = e.cause
    return found


WANTED = {f"{name}{i}": 2.0 * i + 3 for name in "xyz" for i in range(10)}


def test_a_file_makes_a_sidecar_on_the_command_line_and_again_nothing_is_made(shards, tmp_path, capsys):
    file = tmp_path / "sums.py"
    file.write_text(COUNTING)
    words = ["data", "derive", str(shards), "--out", str(tmp_path / "beside"), "--by", str(file), "--batch", "4"]
    main(words)
    assert "30 of 30 samples in 3 shards, 3 of them made now, 0 holes" in capsys.readouterr().out
    assert values(shards, tmp_path / "beside") == WANTED
    assert sorted(path.name for path in (tmp_path / "beside").glob("*.tar")) == ["x.tar", "y-1.tar", "z.b.tar"]
    main(words)
    told = capsys.readouterr()
    assert "0 of them made now" in told.out and "asked" not in told.err


def test_killed_work_goes_on_at_its_shard(shards, tmp_path):
    calls = []

    def failing(samples):
        calls.extend(sample.key for sample in samples)
        if len(calls) > 15:
            raise KeyboardInterrupt
        return sums(samples)

    with pytest.raises(KeyboardInterrupt):
        derive([shards], tmp_path / "out", Deriver(failing, "sums"), batch=3)
    assert not (tmp_path / "out" / "sidecar.json").exists()
    (tmp_path / "out" / ".tmp-y-1.tar-dead").mkdir()
    calls.clear()

    def working(samples):
        calls.extend(sample.key for sample in samples)
        return sums(samples)

    assert "2 of them made now" in derive([shards], tmp_path / "out", Deriver(working, "sums"), batch=3)
    assert calls == [f"{name}{i}" for name in "yz" for i in range(10)]
    assert values(shards, tmp_path / "out") == WANTED
    assert not list((tmp_path / "out").glob(".tmp-*"))


def test_processes_share_the_shards_and_make_each_once(shards, tmp_path):
    file = tmp_path / "sums.py"
    file.write_text(COUNTING)
    command = [sys.executable, "-m", "mmpre", "data", "derive", str(shards), "--out", str(tmp_path / "out"),
               "--by", str(file), "--batch", "2"]  # fmt: skip
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=100) for process in running]
    assert [process.returncode for process in running] == [0, 0], told
    asked = [
        key for _, err in told for line in err.splitlines() if line.startswith("asked") for key in line.split()[1:]
    ]
    assert sorted(asked) == sorted(WANTED)
    assert values(shards, tmp_path / "out") == WANTED


def test_broken_samples_are_holes_and_too_many_stop_it(shards, tmp_path):
    index = open_shards(shards).indexes[0]
    place = index.members(3)[0].offset
    content = bytearray(index.path.read_bytes())
    content[place] ^= 1
    index.path.write_bytes(content)

    def picky(samples):
        if any(sample.key == "y5" for sample in samples):
            raise BadMember("too sad", "notes", "it is")
        return sums(samples)

    told = derive([shards], tmp_path / "out", Deriver(picky, "picky"), batch=4, max_holes=0.1)
    assert "28 of 30 samples" in told and "2 holes (checksum: 1, notes: too sad: 1)" in told
    found = values(shards, tmp_path / "out")
    assert {key: one for key, one in found.items() if one != WANTED[key]} == dict.fromkeys(
        ("x3", "y5"), "hole in sidecar"
    )
    assert json.loads((tmp_path / "out" / "sidecar.json").read_text())["holes"] == {"x.tar": ["x3"], "y-1.tar": ["y5"]}
    with pytest.raises(DeriveError, match=r"1 of 10 samples of .*x.tar cannot be used \(checksum: 1\), at most 5.0%"):
        derive([shards], tmp_path / "other", Deriver(picky, "picky"))


def test_what_does_not_fit_is_told_with_the_way_out(shards, tmp_path):
    derive([shards], tmp_path / "out", Deriver(sums, "one"))
    with pytest.raises(DeriveError, match=r"x.tar is of another by \(one\); give another folder"):
        derive([shards], tmp_path / "out", Deriver(sums, "two"))
    with pytest.raises(DeriveError, match="holds the shards themselves"):
        derive([shards], shards, Deriver(sums, "one"))
    with pytest.raises(DeriveError, match=r"derive\(10 samples\) must return that many mappings .* returned 1 of dict"):
        derive([shards], tmp_path / "few", Deriver(lambda samples: sums(samples)[:1], "few"))
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(SystemExit):
        main(["data", "derive", str(shards), "--out", str(tmp_path / "a"), "--by", str(tmp_path / "empty.py")])


@pytest.fixture
def run(shards, tmp_path):
    return mmpre.train(TONES, out=tmp_path / "run", data=(str(shards),), steps=6, options=RunOptions(workers=0))


def test_a_runs_states_are_those_of_its_network_whatever_they_are_packed_with(shards, run, tmp_path):
    for pool, layer in (("mean", None), ("none", 1)):
        derive([shards], tmp_path / pool, from_run(run, layer=layer, pool=pool), batch=7)
    opened = open_shards(shards)
    alone = from_run(run, layer=1, pool="none")
    mean, every = (Sidecar(tmp_path / pool, opened) for pool in ("mean", "none"))
    reader = ShardReader(opened)
    assert reader.read(0)["notes"] == b"0 1 2"
    for i in (0, 13, 29):
        pooled = safetensors.torch.load(mean.read(i)["derived.safetensors"])
        states = safetensors.torch.load(every.read(i)["derived.safetensors"])
        assert pooled["states"].shape == (1, 32) and states["states"].shape == (3, 32)
        assert states["lengths"].tolist() == [3]
        index, local = opened.locate(i)
        sample = mmpre.data.sample.Sample(index.key(local), index.path.name, index.digest, reader.read(i))
        torch.testing.assert_close(alone.function([sample])[0]["states"], states["states"], rtol=1e-5, atol=1e-6)
    network = mmpre.load(run).recipe.network
    assert (torch.cat([states["states"]]) != 0).any() and len(network.encoder.blocks) == 2


def test_states_that_a_run_cannot_give_are_refused(run):
    with pytest.raises(StatesError, match=r"layer must lie between 0 \(what comes in\) and 2, got 3"):
        from_run(run, layer=3)
    with pytest.raises(StatesError, match="no role text; the network has tones"):
        from_run(run, roles=("text",))
    with pytest.raises(DeriveError, match="pool must be one of mean, none, got 'max'"):
        from_run(run, pool="max")
