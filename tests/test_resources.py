"""Disks that are full or slow, limits of files and memory: the run's state comes first, and the limit is named."""

import gc
import json
import os
import resource
import time
from contextlib import contextmanager

import pytest
from tars import entries, samples, tar
from test_run import TONES, melodies, shards  # noqa: F401  (a fixture)
from test_shard_faults import notes, write

import mmpre
import mmpre.data.shards as shards_module
from mmpre.data.index import open_shards
from mmpre.data.shards import ShardReader
from mmpre.plugins import PluginError, find_recipe
from mmpre.runs.leg import SaveError
from mmpre.runs.metrics import MetricsWriter, append, read_metrics
from mmpre.runs.options import RunOptions


@contextmanager
def files_end_at(count):
    """No file may grow past so many bytes: a full disk that needs no disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.fault("H1")
def test_a_full_disk_costs_lines_of_metrics_but_no_half_ones_and_no_training(tmp_path, caplog):
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    metrics.write({"step": 0, "loss": 1.0})
    with files_end_at(50):
        for step in range(1, 4):
            metrics.write({"step": step, "loss": 0.123456789})
    metrics.write({"step": 4, "loss": 0.5})
    assert [line["step"] for line in read_metrics(metrics.path)] == [0, 4]
    assert metrics.path.read_bytes().count(b"\n") == 2
    assert "training goes on without its lines: make room" in caplog.text and "3 lines are missing" in caplog.text
    with files_end_at(10), pytest.raises(OSError):
        append(tmp_path / "other", "x" * 100)
    assert (tmp_path / "other").read_bytes() == b""


@pytest.mark.fault("H1")
def test_a_run_on_a_full_disk_trains_on_and_can_be_resumed_with_room(melodies, tmp_path, capsys):  # noqa: F811
    run = tmp_path / "run"
    open_shards(list(shards(melodies, "train")))  # indexes are there
    options = RunOptions(workers=0, exact=True, log_every=1, save_every=12)
    told = "checkpoint at step 40 was not written: .*Make room, then go on"
    with files_end_at(5000), pytest.raises(SaveError, match=told):
        mmpre.train(TONES, out=run, data=shards(melodies, "train"), steps=40, options=options)
    assert "checkpoint at step 12 was not written: " in capsys.readouterr().err
    assert 0 < (run / "metrics.jsonl").stat().st_size <= 5000
    assert all(json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    mmpre.resume(run)  # with room again, from the start
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 39


@pytest.mark.fault("H1", "H2")
def test_an_index_that_cannot_be_kept_is_made_each_time(tmp_path, caplog):
    path = tmp_path / "a.tar"
    path.write_bytes(tar(entries(samples(4))))
    with files_end_at(64):
        found = open_shards(path, folder=tmp_path / "cache")
    assert len(found) == 4 and ShardReader(found).read(2)
    assert "cannot be kept anywhere, and is made again each time" in caplog.text
    assert os.listdir(tmp_path / "cache") == [] and not path.with_name("a.tar.idx").exists()


@pytest.mark.fault("H3", "H4")
def test_slow_and_shaky_storage_changes_nothing_and_the_time_waited_is_told(tmp_path, monkeypatch):
    paths = write(tmp_path / "s", notes(120), prefix="train")
    runs, real = [], os.pread
    for fault in (False, True):
        calls = [0]

        def pread(handle, size, offset, fault=fault, calls=calls):
            calls[0] += 1
            if fault:
                time.sleep(0.002)
                if calls[0] % 50 == 0:
                    raise OSError(5, "Input/output error")
            return real(handle, size, offset)

        monkeypatch.setattr(shards_module.os, "pread", pread)
        options = RunOptions(workers=0, exact=True, log_every=1)
        runs.append(mmpre.train(TONES, out=tmp_path / str(fault), data=paths, steps=20, options=options))
        assert calls[0] > 300
    lines = [read_metrics(run / "metrics.jsonl") for run in runs]
    waited = [one[-1]["time"]["waited"] for one in lines]
    assert [line | {"time": 0} for line in lines[0]] == [line | {"time": 0} for line in lines[1]]
    assert waited[1] > waited[0] and waited[1] > 20 * 16 * 0.002


@pytest.mark.fault("H7")
def test_more_memory_than_there_is_names_the_recipe_and_the_place(tmp_path):
    import torch

    torch.zeros(1)
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20), before[1]))
    try:
        found = find_recipe("bert")
        with pytest.raises(
            PluginError, match=r"recipe bert cannot be built with these numbers: .*memory.*\(\w+.py, line"
        ):
            found.build(found.numbers("tiny", {"width": 1 << 20}))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.fault("H8")
def test_memory_does_not_grow_with_the_samples_read(tmp_path):
    paths = write(tmp_path / "s", notes(1000), prefix="train")
    reader = ShardReader(open_shards(paths))

    def grown(count):
        for i in range(count):
            reader.read(i % 1000)
        gc.collect()
        return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

    first = grown(2000)
    assert grown(20_000) - first < 4 << 20
