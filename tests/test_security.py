"""Nothing from data, records or checkpoints runs code, and what the user names leaves the process as it was.

Every probe tries to make a file named `marker`; no probe may succeed.
"""

import io
import json
import os
import pickle
import random
import signal
import subprocess
import sys
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch
from test_cli import run as command
from test_run import TONES, melodies, shards  # noqa: F401  (a fixture)

import mmpre
from mmpre import plugins
from mmpre.data import remote
from mmpre.data.index import ShardError, open_shards
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import ShardReader, shard_writer
from mmpre.plugins import PluginError, find_recipe, survey
from mmpre.runs.options import RunOptions
from mmpre.runs.record import _write as write_record
from mmpre.runs.record_check import RunError

EXACT = RunOptions(workers=0, exact=True)


class Payload:
    """Makes the marker where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "marker"
    yield path
    assert not path.exists(), "a probe ran code"


@pytest.mark.fault("G1", "G7")
@pytest.mark.parametrize(
    "url", ["pipe:touch {}", "PIPE:touch {}", " pipe:touch {}", "x9://x;touch {}", "pipe:touch {} |.tar"]
)
def test_a_url_runs_nothing_and_is_rewritten_by_nothing(marker, monkeypatch, url):
    monkeypatch.setenv("GOPEN_REWRITE", f"gs=pipe:touch {marker};x=pipe:touch {marker}")
    monkeypatch.setenv("WDS_REWRITE", f"gs=pipe:touch {marker}")
    with pytest.raises(ShardError) as caught:
        open_shards(url.format(marker))
    assert any(way in str(caught.value) for way in ("download", "check the p"))


@pytest.mark.fault("G2")
def test_pickled_members_stay_bytes(marker, tmp_path):
    pickled = pickle.dumps(Payload(marker))
    saved, objects = io.BytesIO(), io.BytesIO()
    torch.save(Payload(marker), saved)
    np.save(objects, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    members = {"pkl": pickled, "pickle": pickled, "pyd": pickled, "pth": saved.getvalue(), "npy": objects.getvalue(),
               "txt": pickled, "json": pickled, "jpg": pickled, "regions.safetensors": saved.getvalue()}  # fmt: skip
    with shard_writer(tmp_path / "s", prefix="a") as sink:
        sink.write({"__key__": "k", **members})
    shards = open_shards([str(sink.paths[0])])
    sample = Sample("k", "a", "d", ShardReader(shards).read(0))
    assert sample.members == members
    for read in (sample.text, sample.json, sample.image, sample.array, lambda: sample.tensors(["regions.safetensors"])):
        with pytest.raises(BadMember):
            read()


@pytest.mark.fault("G3")
@pytest.mark.parametrize(
    "name", ["os.system", "logging.os.system", "evil.py", "{folder}/evil.py", "../evil", "mmpre.recipes.bert", "", None]
)
def test_a_record_cannot_name_what_is_imported(marker, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(f"import os; os.system('touch {marker}')\ndef evil(): pass\n")
    run = tmp_path / "run"
    run.mkdir()
    recipe = {"name": name and name.format(folder=tmp_path), "digest": None, "file": None}
    data = [{"fingerprint": "x", "samples": 1, "units": 1}]
    record = {"format": 1, "recipe": recipe, "scale": None, "numbers": {}, "options": {}, "data": data,
              "environment": {}}  # fmt: skip
    (run / "run.json").write_text(json.dumps(record))
    for open_it in (mmpre.resume, mmpre.load):
        with pytest.raises(RunError, match=r"recipe.name must be a plain name.*Put back a copy"):
            open_it(run)


@pytest.mark.fault("G3")
def test_a_file_that_was_put_beside_a_record_is_not_run(marker, melodies, tmp_path):  # noqa: F811
    evil = f"import os\nos.system('touch {marker}')\n"
    run = mmpre.train(TONES, out=tmp_path / "run", data=shards(melodies, "train"), steps=6, options=EXACT)
    (run / "recipe.py").write_text(evil + TONES.read_text())
    with pytest.raises(
        RunError, match=r"recipe.py is not the recipe that the run was started with; put back .*tones.py"
    ):
        mmpre.resume(run)
    record = json.loads((run / "run.json").read_text())
    record["recipe"] |= {"name": "bert", "file": None}
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="heads"):  # the installed recipe was made, not the file
        mmpre.resume(run)


@pytest.mark.fault("G4")
def test_neither_the_working_folder_nor_a_recipes_folder_joins_the_import_path(marker, tmp_path, monkeypatch):
    for name in ("torch", "yaml", "colorsys", "mmpre_helper"):
        (tmp_path / f"{name}.py").write_text(f"import os; os.system('touch {marker}')")
    (tmp_path / "mine.py").write_text("import torch, colorsys\ndef mine(width: int = 3): return torch.__file__\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert find_recipe(tmp_path / "mine.py").function() == torch.__file__
    assert str(tmp_path) not in sys.path


@pytest.fixture
def announce(monkeypatch):
    """Let plugins be announced for a test: (name, module)."""

    def announce(*points):
        made = [EntryPoint(name, value, "mmpre.recipes") for name, value in points]

        def found(group, name=None):
            return [point for point in made if point.group == group and name in (None, point.name)]

        monkeypatch.setattr(plugins, "entry_points", found)

    return announce


@pytest.mark.fault("G5")
def test_a_plugin_that_fails_is_disabled_with_its_reason_and_a_name_taken_twice_is_refused(
    announce, tmp_path, monkeypatch
):
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('needs a newer mmpre')")
    (tmp_path / "leaving_plugin.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    announce(("bert", "mmpre.recipes.bert"), ("bad", "broken_plugin"), ("leaves", "leaving_plugin"),
             ("gone", "no_such"), ("twice", "mmpre.recipes.bert"), ("twice", "mmpre.recipes.mae"))  # fmt: skip
    good, bad = survey("recipe")
    assert good.keys() == {"bert", "twice"}
    assert bad["bad"].endswith("cannot be imported: RuntimeError: needs a newer mmpre")
    assert "SystemExit: 3" in bad["leaves"] and "No module named 'no_such'" in bad["gone"]
    assert bad["twice (mmpre.recipes.mae)"] == "its name is taken by mmpre.recipes.bert"
    with pytest.raises(PluginError, match=r"'twice' is announced by several packages: .*; uninstall all but one"):
        find_recipe("twice")
    with pytest.raises(
        PluginError, match=r"plugin bad .broken_plugin. cannot be imported: RuntimeError: needs a newer"
    ):
        find_recipe("bad")
    assert find_recipe("bert").name == "bert"


RUDE = """
import os, random, signal, sys, numpy, torch
random.seed(1); numpy.random.seed(1); torch.manual_seed(1)
torch.set_num_threads(torch.get_num_threads() + 1)
torch.set_default_dtype(torch.float64)
torch.set_grad_enabled(False)
signal.signal(signal.SIGTERM, lambda *_: None)
sys.path.insert(0, "/nowhere")
os.chdir("/")
def rude(width: int = 3):
    return width
"""


@pytest.mark.fault("G6")
def test_what_a_plugin_changes_of_the_whole_process_is_told_and_put_back(tmp_path, caplog):
    (tmp_path / "rude.py").write_text(RUDE)

    def state():
        return (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), os.getcwd(),
                torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), list(sys.path),
                signal.getsignal(signal.SIGTERM))  # fmt: skip

    before = state()
    assert find_recipe(tmp_path / "rude.py").function() == 3
    assert state() == before
    told = caplog.text
    assert "rude.py changed the folder, the import path, the handler of SIGTERM, Python's random generator" in told
    for what in ("numpy's random generator", "torch's number of threads", "default type", "put back as before"):
        assert what in told


@pytest.mark.fault("G6")
def test_our_own_plugins_change_nothing():
    """In a fresh process, where they are the first to import what they need."""
    done = subprocess.run([sys.executable, "-m", "mmpre", "list"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "bert" in done.stdout
    assert "of the whole process" not in done.stderr


@pytest.mark.fault("G8")
def test_secrets_of_a_url_reach_no_message_and_no_file(capsys, tmp_path, monkeypatch):
    urls = ["http://me:hunter2@127.0.0.1:1/a.tar?token=hunter2#hunter2", "pipe:curl -H hunter2 x", "x9://a:hunter2@b/c"]
    monkeypatch.setattr(remote.Remote, "tries", 1)
    for url in urls:
        code, out, err = command(capsys, "train", TONES, "--data", url, "--out", tmp_path / "run")
        assert code == 2 and "hunter2" not in out + err
        code, out, err = command(capsys, "data", "inspect", url)
        assert code == 2 and "hunter2" not in out + err
    write_record(tmp_path, {"numbers": {"data": urls[:1], "sidecar": urls[0], "lr": 1.0}})
    assert json.loads((tmp_path / "run.json").read_text())["numbers"]["data"] == ["http://127.0.0.1:1/a.tar"]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]


@pytest.mark.fault("G9")
def test_keys_and_texts_cannot_speak_to_the_terminal(capsys, tmp_path):
    from tars import entries, tar

    odd = {"k\x1b[2J\n[/bold]": {"txt": b"hello \x1b]0;title\x07 \xe2\x80\xae", "x\x1b[31m": b"1"}}
    path = tmp_path / "a\x1b[31m.tar"
    path.write_bytes(tar(entries(odd))[: -10240 + 1024])
    for words in (["data", "inspect"], ["data", "index"]):
        code, out, err = command(capsys, *words, path)
        assert code == 0
        assert not {"\x1b", "\x07", "\u202e"} & set(out + err), (out, err)
    assert r"k\x1b[2J\x0a[/bold]" in command(capsys, "data", "inspect", path)[1]


@pytest.mark.fault("H9")
def test_nothing_phones_home(melodies, tmp_path, monkeypatch):  # noqa: F811
    import socket

    asked = []

    def refuse(*address, **_):
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    run = mmpre.train(
        TONES, out=tmp_path / "run", data=shards(melodies, "train"), steps=6, options=RunOptions(workers=0)
    )
    mmpre.resume(run)
    assert mmpre.load(run).recipe.network is not None
    assert asked == []
