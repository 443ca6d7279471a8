"""Features of a run's network in one file: the right ones, with their keys, the same to the byte after any kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from pictures import encoded, noise
from safetensors.torch import load_file
from test_export import a_run
from webdataset import ShardWriter

import mmpre
from mmpre.command_line.cli import main
from mmpre.data.index import open_shards
from mmpre.data.shards import ShardReader
from mmpre.data.units import Units
from mmpre.embed import embed
from mmpre.embed import parts as embed_parts
from mmpre.embed.files import about_of, keys
from mmpre.embed.parts import EmbedError, Work
from mmpre.evaluation.features import towered
from mmpre.modalities.image_patches import ImageReader, middle, random_crops
from mmpre.runs.options import RunOptions
from mmpre.runs.states import RunStates, StatesError

TONES = Path(__file__).parent / "tones.py"
COUNT = 21


def write(folder: Path, samples) -> str:
    folder.mkdir()
    with ShardWriter(str(folder / "s-%03d.tar"), maxcount=8, verbose=0) as sink:
        for i, members in enumerate(samples):
            sink.write({"__key__": f"k{i}é"} | members)
    return str(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of melodies, and shards of some that have other lengths."""
    folder = tmp_path_factory.mktemp("embed")
    shards = write(folder / "shards", ({"notes": " ".join(str(i + j) for j in range(2 + i % 5))} for i in range(COUNT)))
    run = mmpre.train(TONES, out=folder / "run", data=(shards,), steps=6, options=RunOptions(workers=0))
    return run, shards


def alone(run, shards, **settings):
    """The states of each row by itself."""
    states = RunStates(run, **settings)
    return [states.of([states.row(sample, "")])[0] for sample in samples_of(shards)]


def samples_of(shards):
    opened = mmpre.data.index.open_shards(shards)
    units = mmpre.data.units.Units(mmpre.data.shards.ShardReader(opened))
    return [units.sample(i) for i in range(len(units))]


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("pool", "layer"), [("mean", None), ("first", 1), ("none", 0)])
def test_features_are_those_of_each_row_alone_with_its_key(pool, layer, made, tmp_path):
    run, shards = made
    told = embed(run, [shards], tmp_path / "f.safetensors", pool=pool, layer=layer, batch=4, processes=1)
    assert told == {"out": str(tmp_path / "f.safetensors"), "rows": COUNT, "of": COUNT, "holes": {}, "named_in": None}
    found = load_file(tmp_path / "f.safetensors")
    assert keys(tmp_path / "f.safetensors") == [f"k{i}é" for i in range(COUNT)]
    assert found["shard"].tolist() == [i // 8 for i in range(COUNT)] and not found["window"].any()
    states = [one["tones"] for one in alone(run, [shards], layer=layer)]
    if pool == "none":
        assert found["lengths.tones"].tolist() == [2 + i % 5 for i in range(COUNT)]
        close(found["states.tones"], torch.cat(states))
    else:
        pooled = {"mean": lambda x: x.mean(0), "first": lambda x: x[0]}[pool]
        close(found["states.tones"], torch.stack([pooled(x) for x in states]))
    assert not list(tmp_path.glob(".*"))


def test_parquet_holds_the_same_and_batches_of_another_size_differ_in_last_bits(made, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    run, shards = made
    for name, batch in (("a.safetensors", 4), ("a.parquet", 4), ("b.safetensors", 1)):
        embed(run, [shards], tmp_path / name, batch=batch, processes=1)
    one, other = (load_file(tmp_path / f"{name}.safetensors")["states.tones"] for name in "ab")
    close(one, other)
    table = parquet.read_table(tmp_path / "a.parquet")
    assert torch.equal(torch.tensor(table["states.tones"].to_pylist()), one)
    assert table["key"].to_pylist() == keys(tmp_path / "a.safetensors")
    assert table["shard"].to_pylist()[8] == "s-001.tar"
    embed(run, [shards], tmp_path / "n.parquet", pool="none", batch=4, processes=1)
    lengths = [len(row) for row in parquet.read_table(tmp_path / "n.parquet")["states.tones"].to_pylist()]
    assert lengths == [2 + i % 5 for i in range(COUNT)]


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_interrupted_work_goes_on_and_ends_in_the_same_bytes(suffix, made, tmp_path, monkeypatch):
    run, shards = made
    monkeypatch.setitem(embed_parts.PART_BATCHES, "mean", 1)
    whole, out = tmp_path / f"whole.{suffix}", tmp_path / f"out.{suffix}"
    embed(run, [shards], whole, batch=4, processes=1)
    write_part, put_together, calls = Work._write, Work._put_together, []

    def stopping(self, part, path):
        if len(calls) in (2, 4):
            calls.append("stop")
            path.with_name(f".{path.name}.aside-0").write_bytes(b"half")
            raise KeyboardInterrupt
        calls.append(part)
        write_part(self, part, path)

    monkeypatch.setattr(Work, "_write", stopping)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            embed(run, [shards], out, batch=4, processes=1)
        assert not out.exists()
    monkeypatch.setattr(Work, "_put_together", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        embed(run, [shards], out, batch=4, processes=1)
    with pytest.raises(
        EmbedError,
        match=r"parts that were made otherwise \(batch: 4 there, 3 here; data: '\w{12}' .* 8 here\)",
    ):
        embed(run, [shards[:-6] + "shards/s-000.tar"], out, batch=3, processes=1)
    monkeypatch.setattr(Work, "_put_together", put_together)
    embed(run, [shards], out, batch=4, processes=1)
    assert sorted(call for call in calls if call != "stop") == [0, 1, 2, 3, 4, 5]  # none was made twice
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([whole.name, out.name])


def test_two_processes_give_the_same_bytes_and_again_nothing_is_done(made, tmp_path, capsys):
    run, shards = made
    embed(run, [shards], tmp_path / "one.safetensors", batch=1, pool="none", processes=1)
    words = ["embed", str(run), "--data", shards, "--out", str(tmp_path / "two.safetensors"), "--batch", "1"]
    main([*words, "--pool", "none", "--processes", "2"])
    assert capsys.readouterr().out.endswith("two.safetensors: 21 of 21 rows\n")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    before = (tmp_path / "two.safetensors").stat()
    main([*words, "--pool", "none", "--processes", "1"])
    assert (tmp_path / "two.safetensors").stat() == before
    with pytest.raises(SystemExit):
        main([*words, "--processes", "1"])
    assert "is there, made otherwise (pool: 'none' there, 'mean' here)" in capsys.readouterr().err


def test_rows_that_cannot_be_read_are_left_out_named_and_counted(made, tmp_path):
    run, _ = made
    shards = write(tmp_path / "some", ({"notes": "1 2 3" if i % 7 else "four"} for i in range(COUNT)))
    out = tmp_path / "f.safetensors"
    with pytest.raises(
        EmbedError, match=r"3 of 21 rows cannot be read \(s-000.tar: k0é: not notes; .* at most 5.0% may"
    ):
        embed(run, [shards], out, batch=4, processes=1)
    with pytest.raises(EmbedError, match="parts that were made otherwise"):
        embed(run, [shards], out, batch=5, processes=1)
    told = embed(run, [shards], out, batch=4, processes=1, max_holes=0.2)
    assert (told["rows"], told["of"], told["holes"]) == (18, 21, {"not notes": 3})
    named = [json.loads(line) for line in (tmp_path / told["named_in"]).read_text().splitlines()]
    assert [one["key"] for one in named] == ["k0é", "k7é", "k14é"]
    assert len(keys(out)) == len(load_file(out)["states.tones"]) == 18 and "k7é" not in keys(out)
    assert about_of(out)["holes"] == {"not notes": 3}


def test_each_role_and_each_window_has_its_features(tmp_path):
    numbers = dict(width=32, depth=1, heads=2, length=8)
    run = a_run(tmp_path / "run", "bert", **numbers)
    shards = write(tmp_path / "shards", ({"txt": text} for text in ("one two three four", "five")))
    embed(run, [shards], tmp_path / "f.safetensors", processes=1)
    found = load_file(tmp_path / "f.safetensors")
    assert found["window"].tolist() == [0, 1, 2, 3, 0]
    assert keys(tmp_path / "f.safetensors") == ["k0é"] * 4 + ["k1é"]
    states = RunStates(run)
    sample = samples_of([shards])[0].at_window(2)
    row = states.row(sample, "")
    state_nD = states.of([row])[0]["text"]
    close(found["states.text"][2], state_nD[1:-1].mean(0))  # without [CLS] and [SEP]


def test_pictures_are_cut_in_the_middle_not_at_random(tmp_path):
    numbers = dict(
        width=32, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2, patch_px=8, side_px=16
    )
    run = a_run(tmp_path / "run", "mae", **numbers)
    shards = write(tmp_path / "shards", ({"png": encoded(noise(40, 24, i))} for i in range(3)))
    embed(run, [shards], tmp_path / "f.safetensors", pool="first", processes=1)
    states = RunStates(run)
    states.readers = {"image": ImageReader(8, middle(16))}
    wanted = [states.of([states.row(sample, "")])[0]["image"][0] for sample in samples_of([shards])]
    close(load_file(tmp_path / "f.safetensors")["states.image"], torch.stack(wanted))
    assert ImageReader(8, None).still() == ImageReader(8, None) and random_crops(16).still


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(out="f.npy"), EmbedError, r"f.npy must end in .safetensors or .parquet"),
        (dict(pool="max"), EmbedError, "pool must be one of mean, first, none, tower, got 'max'"),
        (dict(batch=0, max_holes=2.0), EmbedError, "batch must be at least 1, got 0; max_holes is a share"),
        (dict(processes=0), EmbedError, "processes must be at least 1, got 0"),
        (dict(layer=5), StatesError, r"layer must lie between 0 \(what comes in\) and 2, got 5"),
        (dict(roles=("image",)), StatesError, "no role image; the network has tones"),
        (dict(data=()), EmbedError, "no shards were given; name some with --data"),
    ],
)
def test_what_cannot_be_done_is_told_and_leaves_nothing(settings, error, message, made, tmp_path):
    run, shards = made
    given = dict(data=[shards], processes=1) | settings
    with pytest.raises(error, match=message):
        embed(run, out=tmp_path / given.pop("out", "f.safetensors"), **given)
    assert not list(tmp_path.iterdir())


def test_another_file_is_not_overwritten(made, tmp_path):
    run, shards = made
    (tmp_path / "f.safetensors").write_text("mine")
    with pytest.raises(EmbedError, match="is there and was not made by embed"):
        embed(run, [shards], tmp_path / "f.safetensors", processes=1)
    assert (tmp_path / "f.safetensors").read_text() == "mine"


@pytest.mark.slow
def test_killed_at_any_moment_and_under_torchrun_the_bytes_are_the_same(made, tmp_path):
    run, shards = made
    embed(run, [shards], tmp_path / "whole.safetensors", batch=1, pool="none", processes=1)
    words = ["-m", "mmpre", "embed", str(run), "--data", shards, "--batch", "1", "--pool", "none", "--out"]
    killed = tmp_path / "killed.safetensors"
    for wait_s in (3.0, 4.0, 5.0, 6.0):
        started = subprocess.Popen([sys.executable, *words, str(killed), "--processes", "2"], start_new_session=True)
        time.sleep(wait_s)
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    subprocess.run([sys.executable, *words, str(killed), "--processes", "1"], check=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, *words, str(tmp_path / "many.safetensors")], check=True)
    wanted = (tmp_path / "whole.safetensors").read_bytes()
    assert killed.read_bytes() == wanted and (tmp_path / "many.safetensors").read_bytes() == wanted


def test_towers_give_vectors_in_the_space_that_they_share(made, tmp_path):
    pairs = [{"png": encoded(noise(16, 16, seed=i)), "txt": "a grey one " * (1 + i % 3)} for i in range(9)]
    shards = write(tmp_path / "pairs", pairs)
    small = dict(patch_px=8, side_px=16, width=16, depth=1, heads=2, shared=12, batch=4, warmup=1)
    run = mmpre.train("two_towers", scale="tiny", out=tmp_path / "run", data=(shards,), steps=2, **small)
    embed(run, [shards], tmp_path / "f.safetensors", pool="tower", batch=4, processes=1)
    found, towers = load_file(tmp_path / "f.safetensors"), mmpre.load(run).recipe.towers
    units = Units(ShardReader(open_shards([shards])))
    numbered = [(i, units.sample(i)) for i in range(9)]
    for role, member in (("image_patches", "png"), ("text", "txt")):
        want_SD = torch.from_numpy(towered(towers[role], role, member, numbered).x_LSD[0])
        close(found[f"states.{role}"], want_SD.float())
        assert found[f"states.{role}"].shape == (9, 12)
    embed(run, [shards], tmp_path / "t.safetensors", pool="tower", roles=("text",), processes=1)
    close(load_file(tmp_path / "t.safetensors")["states.text"], found["states.text"])
    wrong = [
        (run, dict(roles=("sound",)), StatesError, "no tower sound; the recipe has image_patches, text"),
        (run, dict(layer=1), EmbedError, "towers end in one vector and have no layer to choose, got layer 1"),
        (made[0], {}, StatesError, "its recipe names no towers; take the mean of states, or the first one"),
    ]
    for one, settings, error, message in wrong:
        with pytest.raises(error, match=message):
            embed(one, [shards], tmp_path / "x.safetensors", pool="tower", processes=1, **settings)
