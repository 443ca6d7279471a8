"""`mmpre new-modality`, and the guide's example."""

import io
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import mmpre
from mmpre.command_line.cli import main
from mmpre.command_line.new_modality import MODULE, new_modality
from mmpre.data.sample import Sample
from mmpre.evaluation.evaluate import evaluate
from mmpre.plugins import find_data_set, find_recipe
from mmpre.testing import check_modality

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "wrist_motion.py"


@pytest.mark.parametrize("name", ["heart_beats", "x"])
def test_what_is_written_is_clean_and_its_own_test_passes(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["new-modality", name])
    assert f"pytest test_{name}.py" in capsys.readouterr().out
    written = (tmp_path / f"{name}.py").read_text() + (tmp_path / f"test_{name}.py").read_text()
    assert "ripples" not in written.lower()
    # the order of imports depends on the name
    command = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--ignore", "I001", "."]
    lint = subprocess.run(command, capture_output=True, text=True)
    assert lint.returncode == 0, lint.stdout
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"test_{name}.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and "2 passed" in done.stdout, done.stdout[-3000:]


def test_a_name_that_cannot_be_used_is_refused_and_nothing_is_written_over(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("Wrist", "wrist-motion", "class", "../up", ""):
        with pytest.raises(SystemExit):
            main(["new-modality", name])
        assert (
            f"must be one of a Python module, in lower case, such as wrist_motion; got {name!r}"
            in capsys.readouterr().err
        )
    for name in ("view", "adam_w", "tokens", "io", "np", "numpy", "torch", "nn", "mmpre", "wave", "len"):
        taken = {"view": "View", "adam_w": "AdamW", "tokens": "Tokens"}.get(name, name)
        with pytest.raises(ValueError, match=rf"got '{name}' \({taken} is such\); add a word, such as my_{name}$"):
            new_modality(name, tmp_path)
        new_modality(f"my_{name}", tmp_path / "good")
    (tmp_path / "test_mine.py").write_text("mine")
    with pytest.raises(FileExistsError, match=r"test_mine\.py is there already; name another one, or remove it"):
        new_modality("mine", tmp_path)
    assert (
        sorted(os.listdir(tmp_path)) == ["good", "test_mine.py"] and (tmp_path / "test_mine.py").read_text() == "mine"
    )


def watch(folder, pickled=None):
    """A wheel as the real one is made: fewer and shorter recordings, in which the exercise is how the watch lies."""
    rng, series, label, who = np.random.default_rng(0), [], [], []
    lies = rng.normal(0, 2, (7, 6))
    for person in range(1, 11):
        for exercise in range(7):
            t = np.arange(400)[:, None] / 50
            wave = np.sin(2 * np.pi * 0.5 * t + rng.uniform(0, 6, 6))
            series.append(wave + lies[exercise] + rng.normal(0, 0.1, (400, 6)))
            label.append(exercise)
            who.append(person)
    told = {"X": series, "y": np.array(label), "subject": np.array(who)} if pickled is None else pickled
    file = io.BytesIO()
    np.save(file, np.array(told, dtype=object), allow_pickle=True)
    with zipfile.ZipFile(folder / "seglearn-0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("seglearn/data/watch_dataset.npy", file.getvalue())
    return folder / "seglearn-0-py3-none-any.whl"


def test_the_example_is_one_short_file_that_the_guide_shows():
    text = EXAMPLE.read_text()
    assert len(text.splitlines()) < 120
    guide = (ROOT / "docs" / "new_modality.md").read_text()
    assert "examples/wrist_motion.py" in guide
    for line in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        assert line in text or line in MODULE, f"the guide shows what is not in the files:\n{line}"


def test_the_example_builds_trains_and_is_probed(tmp_path, monkeypatch):
    shards = find_data_set(str(EXAMPLE)).build(tmp_path / "shards", source=watch(tmp_path))
    (told,) = re.findall(r"`mmpre (data inspect shards[^`]*)`", (ROOT / "docs" / "new_modality.md").read_text())
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLE, tmp_path)
    main(shlex.split(told))
    assert (tmp_path / "hidden.png").is_file()
    paths = {split: (str(shards / split),) for split in ("train", "valid", "test")}
    run = mmpre.train(EXAMPLE, out=tmp_path / "run", data=paths["train"], valid=paths["valid"], width=32, steps=25)
    answer = evaluate(run)
    assert answer["trained"]["tasks"]["motion"]["loss"] < answer["untrained"]["tasks"]["motion"]["loss"]
    probe = answer["trained"]["results"][0]
    assert probe["name"] == "wrist: the exercise, of 7: linear probe"
    assert probe["value"] > 0.5 > 0.2 > probe["chance"] and probe["n"] == 2 * 7 * 2


def test_the_examples_modality_keeps_the_contract():
    module = find_data_set(str(EXAMPLE))

    def sample(count):
        data = io.BytesIO()
        np.save(data, np.random.default_rng(count).normal(size=(count, 6)).astype(np.float32))
        return Sample(f"{count}", "shard", "digest", {"npy": data.getvalue()})

    check_modality(module.Motion(16), [sample(256), sample(48), sample(8)])
    assert find_recipe(EXAMPLE).name == "wrist_motion"


def test_the_example_unpickles_numbers_alone(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'marker'}",)

    wheel = watch(tmp_path, pickled={"X": Evil()})
    with pytest.raises(pickle.UnpicklingError, match=r"system is not allowed in this file"):
        find_data_set(str(EXAMPLE)).build(tmp_path / "shards", source=wheel)
    assert not (tmp_path / "marker").exists()
