"""The command line: what it accepts, and how it refuses."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset
from tars import flip
from test_run import TONES, melodies, shards  # noqa: F401  (a fixture)

import mmpre
from mmpre.command_line.arguments import comments
from mmpre.command_line.cli import main
from mmpre.data.shard_writer import shard_writer
from mmpre.plugins import PluginError, find_recipe
from mmpre.recipes import bert


def run(capsys, *words):
    """Exit code and what was printed."""
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as e:
        code = e.code or 0
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "there is no command 'trian'; did you mean 'train'?"),
        (["data", "biuld"], "there is no command 'biuld'; did you mean 'build'?"),
        (["train", "unitr"], "there is no recipe 'unitr'; did you mean 'uniter'?, or give the path of a .py file"),
        (["train", "uniter", "--scale", "tny"], "recipe uniter has no scale 'tny'; did you mean 'tiny'?"),
        (["train", "uniter", "--scale"], "--scale needs a value"),
        (["train", "nowhere/mine.py"], "there is no recipe file nowhere/mine.py"),
        (
            ["train", "bert", "--scale", "tiny"],
            "no shards: give the recipe's `data` (on the command line: --data SHARD",
        ),
        (
            ["train", "bert", "--scale", "tiny", "--hide", "1.5"],
            "rate must lie between 0 and 1, got 1.5; 15 percent is",
        ),
        (["train", "bert", "--precision", "fp8"], "precision must be fp32 or bf16, got 'fp8'"),
        (["train", "bert", "--data", "pipe:touch marker"], "would run its text as a shell command"),
        (["train", "bert", "--data", "missing.tar"], "missing.tar"),
        (["resume", "nowhere"], "nowhere is not a run: it has no run.json"),
        (["eval", "nowhere"], "nowhere is not a run"),
        (["data", "build", "colages"], "there is no data set 'colages'; did you mean 'collages'?"),
        (["data", "index", "missing.tar"], "missing.tar"),
    ],
)
def test_a_problem_is_told_in_one_message_with_exit_code_2(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert code == 2
    assert message in err, err
    assert "Traceback" not in out + err
    assert not list(tmp_path.rglob("marker"))


@pytest.mark.fault("C1")
def test_a_wrong_flag_is_answered_with_the_nearest_right_one(capsys):
    code, out, err = run(capsys, "train", "uniter", "--scale", "tiny", "--widht", "5")
    assert code == 2
    assert "--width" in out + err


def test_the_help_of_a_recipe_lists_every_number_with_its_meaning_and_the_scales_default(capsys):
    code, out, _ = run(capsys, "train", "uniter", "--scale", "tiny", "--help")
    assert code == 0
    text = re.sub(r"[\s│]+", " ", out)
    assert "arXiv:1909.11740" in text
    assert re.search(r"--width INT of the states \(default: 96\)", text)
    assert re.search(r"--wra FLOAT weight of word-region alignment; 0 leaves it out \(default: 1.0\)", text)
    assert re.search(r"--exact, --no-exact add gradients in float64", text)
    assert re.search(r"--seed INT .*\(default: 0\)", text)


def test_comments_beside_arguments_are_their_help():
    source = "def f(\n    a: int = 1,  # the first\n    b: tuple[str, ...] = (),\n    c: float = 1e-3,  # the third\n):"
    assert comments(source) == {"a": "the first", "c": "the third"}


@pytest.mark.fault("C12")
def test_a_recipe_file_is_trained_resumed_and_its_numbers_recorded(capsys, tmp_path, melodies):  # noqa: F811
    out = tmp_path / "run"
    words = ["--data", *shards(melodies, "train"), "--steps", "12", "--lr", "1e-3", "--workers", "0", "--out", out]
    code, _, err = run(capsys, "train", TONES, *words)
    assert code == 0, err
    record = json.loads((out / "run.json").read_text())
    assert (record["numbers"]["steps"], record["numbers"]["lr"], record["options"]["workers"]) == (12, 1e-3, 0)
    assert run(capsys, "resume", out)[1].strip() == f"{out} is finished: nothing left to train"
    code, _, err = run(capsys, "train", TONES, *words)
    assert (code, f"{out} already holds a run" in err) == (2, True)
    code, out_text, _ = run(capsys, "eval", out, "--data", *shards(melodies, "valid"), "--json")
    answer = json.loads(out_text)
    assert answer["trained"]["tasks"]["pitch"]["loss"] < answer["untrained"]["tasks"]["pitch"]["loss"]


def test_a_copied_recipe_is_found_under_the_name_of_its_file(tmp_path):
    copy = tmp_path / "mine.py"
    copy.write_text(Path(bert.__file__).read_text())
    found = find_recipe(copy)
    assert (found.name, found.function.__name__) == ("mine", "bert") and "tiny" in found.scales
    two = tmp_path / "two.py"
    two.write_text(copy.read_text() + "\n\ndef other() -> Recipe:\n    return bert()\n")
    with pytest.raises(PluginError, match=r"must define a function two\(\.\.\.\) that returns an mmpre.Recipe"):
        find_recipe(two)


def test_who_reads_only_the_first_lines_sees_no_traceback():
    words = "import sys; from mmpre.command_line.cli import main; main(['--help'])"
    pipe = subprocess.Popen([sys.executable, "-c", words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    pipe.stdout.close()
    assert pipe.stderr.read() == b"" and pipe.wait() == 0


@pytest.mark.fault("G4")
def test_nothing_beside_a_recipe_file_can_stand_in_for_a_package(tmp_path, melodies):  # noqa: F811
    (tmp_path / "torch.py").write_text("raise SystemExit('shadowed')")
    (tmp_path / "tones.py").write_text(TONES.read_text())
    out = mmpre.train(tmp_path / "tones.py", out=tmp_path / "run", data=shards(melodies, "train"), steps=6)
    assert (out / "recipe.py").exists()


def test_list_names_what_is_installed(capsys):
    told = json.loads(run(capsys, "list", "--json")[1])
    assert {"bert", "uniter"} <= told["recipes"].keys()
    assert "tiny" in told["recipes"]["uniter"]["scales"]
    assert {"text", "regions"} <= told["modalities"].keys()
    assert told["data sets"]["collages"]["licence"].startswith("CC-BY-SA")


def test_index_and_inspect_tell_what_is_in_shards_and_what_is_wrong(capsys, tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "a-%03d.tar"), verbose=0) as sink:
        for i in range(5):
            sink.write({"__key__": f"k{i}", "txt": f"text {i} \x1b[31m"} | ({"jpg": b"123"} if i else {}))
    path = tmp_path / "a-000.tar"
    told = json.loads(run(capsys, "data", "inspect", path, "--json")[1])
    assert told["members"]["jpg"] == {"count": 4, "bytes": 12, "missing": 1}
    shown = run(capsys, "data", "inspect", path)[1]
    assert "k0" in shown
    assert "\x1b[31m" not in shown
    whole = path.read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: whole.index(b"text 3") + 3])
    told = json.loads(run(capsys, "data", "index", tmp_path / "cut.tar", "--json")[1])
    assert told["samples"] <= 4
    assert told["problems"]


@pytest.mark.fault("A13")
def test_index_verifies_all_that_it_finds_indexed(capsys, tmp_path):
    with shard_writer(tmp_path / "a") as sink:
        for i in range(5):
            sink.write({"__key__": f"k{i}", "txt": f"text {i}"})
    assert run(capsys, "data", "index", tmp_path / "a", "--verify")[0] == 0
    (path,) = sink.paths
    time, whole = path.stat().st_mtime_ns, path.read_bytes()
    path.write_bytes(flip(whole, len(whole) - 1))  # behind all members, where a start does not look
    os.utime(path, ns=(time, time))
    assert run(capsys, "data", "index", path)[0] == 0
    code, _, err = run(capsys, "data", "index", path, "--verify")
    assert code == 2 and path.name in err and "copy it again, or index it anew" in err
