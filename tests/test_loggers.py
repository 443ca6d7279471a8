"""Loggers get what metrics.jsonl gets, once; none of them can end a run."""

import logging
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import webdataset

import mmpre
from mmpre.runs.loggers import Loggers, flat
from mmpre.runs.metrics import read_metrics
from mmpre.runs.options import RunOptions

TONES = Path(__file__).parent / "tones.py"
RECORD = {"started": "2026-01-02T03:04:05+00:00", "recipe": {"name": "tones"}, "scale": None, "numbers": {"width": 32},
          "options": {"seed": 3}}  # fmt: skip
LINE = {"step": 4, "task": "mlm", "loss": 1.5, "mlm": 1.5, "norm": 2.0, "lr": 0.1, "tokens": 9, "rows": 2,
        "picked": {"word": 0.15}, "skipped": True, "keys": ["a"], "time": {"tokens_per_second": 7}}  # fmt: skip


@pytest.fixture(scope="module")
def melodies(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("melodies"), np.random.default_rng(0)
    with webdataset.ShardWriter(str(folder / "m-%03d.tar"), maxcount=100, verbose=0) as sink:
        for i in range(40):
            sink.write({"__key__": f"m{i:03d}", "notes": f"{rng.normal():.3f} 1 2".encode()})
    return (str(folder),)


def trained(out, data, log_to, **numbers):
    options = RunOptions(exact=True, workers=0, log_every=1, save_every=4, keep=9, log_to=log_to)
    return mmpre.train(TONES, out=out, options=options, data=data, valid=data, steps=10, **numbers)


def back_to(run, step):
    """Lose what came after a checkpoint, as a kill does."""
    import shutil

    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


class Fake(types.ModuleType):
    """What wandb and trackio have in common: init(...) returns a run with log(values, step=) and finish()."""

    def __init__(self, name, fails_at=None):
        super().__init__(name)
        self.fails_at, self.inits, self.steps, self.finished = fails_at, [], [], 0

    def init(self, **arguments):
        self.inits.append(arguments)
        return self

    def log(self, values, *, step):
        if step == self.fails_at:
            raise ConnectionError("no network")
        assert values and all(isinstance(value, float) for value in values.values())
        self.steps.append(step)

    def finish(self):
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def fake(request, monkeypatch):
    module = Fake(request.param)
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def test_lines_become_numbers_by_name():
    assert flat(LINE) == {
        "train/mlm/loss": 1.5, "train/mlm/mlm": 1.5, "train/norm": 2.0, "train/lr": 0.1, "train/tokens": 9.0,
        "train/rows": 2.0, "train/mlm/picked/word": 0.15, "train/tokens_per_second": 7.0,
    }  # fmt: skip
    valid = {"step": 9, "valid": {"mlm": {"loss": 1.0, "mlm": 1.0}}, "valid_loss": 1.0, "best": True}
    assert flat(valid) == {"valid/mlm/loss": 1.0, "valid/mlm/mlm": 1.0, "valid/loss": 1.0}


def test_a_run_and_its_resumption_are_told_once(fake, melodies, tmp_path):
    run = trained(tmp_path / "run", melodies, fake.__name__)
    logged = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    assert fake.steps == logged and fake.finished == 1
    back_to(run, 4)
    mmpre.resume(run)
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == logged
    assert fake.steps == logged and len(fake.inits) == 2
    names = [arguments.get("id") or arguments["name"] for arguments in fake.inits]
    assert names[0] == names[1] and names[0].startswith("run-")
    assert {arguments["resume"] for arguments in fake.inits} == {"allow"}
    assert fake.inits[0]["config"]["width"] == 32 and fake.inits[0]["config"]["exact"] is True


def test_a_logger_that_fails_is_told_once_and_the_run_goes_on(fake, melodies, tmp_path, caplog):
    fake.fails_at = 3
    with caplog.at_level(logging.WARNING):
        run = trained(tmp_path / "run", melodies, fake.__name__)
    told = [message for message in caplog.messages if fake.__name__ in message]
    assert told == [f"nothing more is logged to {fake.__name__} (ConnectionError: no network)"]
    assert fake.steps == [0, 1, 2]
    assert len([line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]) == 10


def test_a_logger_that_is_not_installed_says_how_to_install_it(monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        loggers = Loggers(["wandb"], tmp_path, RECORD)
    loggers.write(LINE)
    assert "pip install 'mmpre[wandb]'" in caplog.text


def test_an_unknown_logger_is_refused_before_the_run():
    with pytest.raises(ValueError, match="there is no logger 'tensorbord'; there are tensorboard, wandb, trackio"):
        RunOptions(log_to="tensorboard,tensorbord")


def test_tensorboard_shows_every_step_once_after_a_kill(melodies, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = trained(tmp_path / "run", melodies, "tensorboard")
    back_to(run, 4)
    mmpre.resume(run)
    events = accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    shown = events.Scalars("train/pitch/loss")
    assert [one.step for one in shown] == [line["step"] for line in lines] == list(range(10))
    assert [one.value for one in shown] == pytest.approx([line["loss"] for line in lines])
    assert [one.step for one in events.Scalars("valid/loss")] == [9]
