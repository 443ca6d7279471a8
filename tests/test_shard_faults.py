"""Faults of shards as a run meets them: what is lost is counted, the order stands, nothing is joined."""

import json
import os
from collections import Counter
from dataclasses import replace

import pytest
import torch
from tars import entries, flip, samples, tar
from test_run import TONES

import mmpre
from mmpre.data.index import open_shards
from mmpre.data.ledger import TooManyHolesError
from mmpre.data.loader import LoadingError, MicroBatches, slots
from mmpre.data.shards import CorruptSample, ShardReader, shard_writer
from mmpre.data.units import Units
from mmpre.plugins import find_recipe
from mmpre.runs.metrics import read_metrics
from mmpre.runs.options import RunOptions


def write(folder, made, **options):
    with shard_writer(folder, **options) as sink:
        for key, members in made.items():
            sink.write({"__key__": key, **members})
    return tuple(str(path) for path in sink.paths)


def notes(count, prefix="m"):
    return {f"{prefix}{i:04d}": {"notes": b"1 2 3 %d" % (i % 7)} for i in range(count)}


def ledger(run):
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


@pytest.mark.fault("A8")
def test_a_cut_sample_and_a_shard_that_begins_with_its_key_give_no_false_pair(tmp_path):
    for name in ("a", "b"):
        made = {f"k{i}": {"jpg": f"picture {name}{i}".encode(), "txt": f"text {name}{i}".encode()} for i in range(2)}
        (tmp_path / f"{name}.tar").write_bytes(tar(entries(made)))
    whole = (tmp_path / "a.tar").read_bytes()
    for end in range(512, 2048, 61):  # inside sample k0 of a, and of what follows it
        (tmp_path / "a.tar").write_bytes(whole[:end])
        (tmp_path / "a.tar.idx").unlink(missing_ok=True)
        read = ShardReader(open_shards(tmp_path))
        for i in range(len(read.shards)):
            try:
                members = read.read(i)
            except CorruptSample:
                continue
            name = read.shards.locate(i)[0].path.name[0]
            number = read.shards.key(i)[1]
            assert set(members.values()) <= {f"{kind} {name}{number}".encode() for kind in ("picture", "text")}
        assert [read.read(len(read.shards) - 2 + i)["txt"] for i in (0, 1)] == [b"text b0", b"text b1"]


@pytest.mark.fault("A11")
def test_a_missing_member_is_a_hole_of_its_modality_and_past_a_share_the_run_stops(tmp_path):
    made = notes(100)
    for i in (3, 40):
        made[f"m{i:04d}"] = {"txt": b"no notes"}
    paths = write(tmp_path / "s", made, prefix="train")
    options = RunOptions(workers=0, exact=True)
    run = mmpre.train(TONES, out=tmp_path / "run", data=paths, steps=25, options=options)
    holes = ledger(run)
    assert Counter(hole["key"] for hole in holes) == {"m0003": 4, "m0040": 4}
    assert {(hole["cause"], hole["modality"]) for hole in holes} == {("missing member", "tones")}
    assert holes[0]["detail"] == "wanted .notes, the sample has txt"
    for i in range(50):
        made[f"m{i:04d}"] = {"txt": b"no notes"}
    paths = write(tmp_path / "t", made, prefix="train")
    whole = RunOptions(workers=0, exact=True, max_holes=1.0)
    unbroken = mmpre.load(mmpre.train(TONES, out=tmp_path / "whole", data=paths, steps=25, options=whole))
    with pytest.raises(TooManyHolesError, match=r"cannot be used, the run allows 5.0%.*missing member: .*allow more"):
        mmpre.train(TONES, out=tmp_path / "other", data=paths, steps=25, options=options)
    assert mmpre.load(tmp_path / "other").checkpoint.step > 0  # what was done by then is kept
    mmpre.resume(tmp_path / "other", max_holes=1.0)
    again = mmpre.load(tmp_path / "other")
    assert again.checkpoint.step == unbroken.checkpoint.step == 25
    assert again.checkpoint.state["ledger"] == unbroken.checkpoint.state["ledger"]
    logged = [[line | {"time": 0} for line in read_metrics(one.path / "metrics.jsonl")] for one in (unbroken, again)]
    assert logged[0] == logged[1]
    for name, value in unbroken.checkpoint.tensors["model"].items():
        assert torch.equal(again.checkpoint.tensors["model"][name], value)


@pytest.mark.fault("A13")
def test_a_shard_that_was_replaced_with_its_size_and_time_is_not_taken_for_the_old_one(tmp_path, caplog):
    path = tmp_path / "a.tar"
    made = samples(40)
    path.write_bytes(tar(entries(made)))
    before = open_shards(path)
    stat = path.stat()
    other = {key: {s: bytes(reversed(data)) for s, data in members.items()} for key, members in made.items()}
    path.write_bytes(tar(entries(other)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    for i in range(40):  # a reader that is open already
        with pytest.raises(CorruptSample, match="do not fit their CRC-32"):
            ShardReader(before).read(i)
    with pytest.raises(ValueError, match=r"its SHA-256 is"):
        ShardReader(before).verify()
    now = open_shards(path)  # a start
    assert "does not fit the shard's content, which was replaced since" in caplog.text
    assert now.fingerprint != before.fingerprint and ShardReader(now).read(7) == other["s0007"]


@pytest.mark.fault("A16")
def test_a_shard_that_vanishes_while_training_stops_the_run_with_its_name_and_no_hole(tmp_path, monkeypatch):
    paths = write(tmp_path / "s", notes(120), prefix="train", maxcount=40)
    made, real = [], MicroBatches._make

    def vanish(self, slot):
        reader = self.units.parts[0].reader
        reader.wait_s = 0.001
        made.append(slot.step)
        if slot.step == 5:
            os.rename(paths[1], paths[1] + ".gone")
            reader.close()
        return real(self, slot)

    monkeypatch.setattr(MicroBatches, "_make", vanish)
    with pytest.raises(LoadingError, match=r"reading step \d+ failed: .*train-000001.tar.*No such file.*then resume"):
        mmpre.train(
            TONES, out=tmp_path / "run", data=paths, steps=40, options=RunOptions(workers=0, exact=True, save_every=2)
        )
    assert not (tmp_path / "run" / "ledger.jsonl").exists()
    os.rename(paths[1] + ".gone", paths[1])
    monkeypatch.setattr(MicroBatches, "_make", real)
    mmpre.resume(tmp_path / "run")
    assert not (tmp_path / "run" / "ledger.jsonl").exists()


@pytest.mark.fault("A17")
@pytest.mark.parametrize("world", [1, 2, 4])
def test_very_uneven_shards_give_every_process_the_same_steps_and_every_sample_once(tmp_path, world):
    paths = [path for n, count in enumerate((1, 7, 248)) for path in write(tmp_path / str(n), notes(count, f"p{n}-"))]
    stage = find_recipe(TONES).function(batch=16, micro_batches=4).stages[0]
    units = Units(ShardReader(open_shards(paths)))
    made = MicroBatches.of(stage, units, seed=0, number=0)
    seen, counts = Counter(), []
    for rank in range(world):
        mine = list(slots(stage, 0, 0, 16, rank, world))
        counts.append(len(mine))
        for slot in mine:
            seen.update(made[slot].units)
    assert counts == [64 // world] * world
    assert seen == Counter(range(256))


@pytest.mark.fault("A19")
def test_an_empty_split_and_a_ratio_that_is_no_share_are_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar([]))
    with pytest.raises(ValueError, match=r"a.tar: .*holds no sample.*download or write it again"):
        open_shards(tmp_path)
    stage = find_recipe(TONES).function().stages[0]
    for ratio in (0, -1, 0.5, float("nan")):
        with pytest.raises(ValueError, match=f"ratio must be a whole number above 0, got {ratio}"):
            replace(stage, tasks=[replace(stage.tasks[0], ratio=ratio)])


@pytest.mark.fault("A5")
def test_damage_met_in_a_run_is_counted_alike_whatever_the_workers(tmp_path):
    paths = write(tmp_path / "s", notes(100), prefix="train")
    index = open_shards(paths).indexes[0]
    path = index.path
    path.write_bytes(flip(path.read_bytes(), index.members(17)[0].offset, 3))
    told = []
    for workers in (0, 1):
        options = RunOptions(workers=workers, exact=True)
        run = mmpre.train(TONES, out=tmp_path / f"run{workers}", data=paths, steps=13, options=options)
        told.append((run / "ledger.jsonl").read_text())
    assert told[0] == told[1]
    assert {json.loads(line)["key"] for line in told[0].splitlines()} == {"m0017"}
