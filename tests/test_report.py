"""`mmpre report`: what the page says of runs."""

import fcntl
import html
import json
import os
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import small_runs
from small_runs import EVIL

from mmpre.command_line.arguments import asked_of
from mmpre.command_line.cli import main
from mmpre.plugins import find_recipe
from mmpre.report import chart, page
from mmpre.report.account import read
from mmpre.report.chart import Axis, Chart, Mark, Series, number
from mmpre.report.curves import _rates, groups
from mmpre.report.differences import differences
from mmpre.report.page import report
from mmpre.runs.command import again
from mmpre.runs.commit import commit
from mmpre.runs.options import RunOptions
from mmpre.runs.record import read_record
from mmpre.runs.record_check import RunError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return folder, small_runs.pairs(folder)


@pytest.fixture(scope="module")
def two(shards, tmp_path_factory):
    """Two runs that differ in one number, and in what they ran on."""
    out = tmp_path_factory.mktemp("runs")
    folder, data = shards
    return small_runs.bert(folder, out / "a", **data), small_runs.bert(folder, out / "b", hide=0.4, **data)


def text_of(path):
    """What a reader sees, folds and charts included."""
    shown = re.sub(r"<style>.*?</style>|<script>.*?</script>", "", path.read_text(encoding="utf-8"), flags=re.S)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", shown)))


def altered(run, tmp_path, **record):
    """A copy of a run without its weights, with another record."""
    made = tmp_path / "altered"
    made.mkdir()
    (made / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | record))
    (made / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    return made


def test_the_page_says_what_was_run_and_how_it_ended(two):
    said = text_of(report([two[0]]))
    assert "BERT: predict hidden words of a text." in said
    assert "finished" in said and "all 8 steps were done" in said
    assert "0 in 32 rows" in said  # holes
    for name in ("torch", "python", commit() or "code", "fingerprint", "Devlin et al. 2018"):
        assert name in said, name
    assert "Nothing: no sample was unusable, no step was skipped, no restart." in said


def test_the_flops_of_the_steps_that_were_done_are_told_where_the_run_can_be_planned(two, tmp_path):
    whole = read(two[0]).flops
    assert whole > 0 and f"{whole:.3g} as planned" in text_of(report([two[0]], tmp_path / "page.html"))
    outcome = read(two[0]).record["outcome"] | {"step": 2, "finished": False}
    half = altered(two[0], tmp_path, outcome=outcome)
    lines = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
    (half / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < 4))
    assert read(half).flops == pytest.approx(whole * 4 / 8)
    (half / "run.json").write_text(json.dumps(read(half).record | {"numbers": {"tokenizer": "gone.json"}}))
    assert read(half).flops is None


def test_the_command_on_the_page_asks_for_the_same_run_again(two):
    for run in two:
        (what, command), *more = read(run).commands
        assert what == "run it again" and not more
        assert f"<code>{html.escape(command)}</code>".replace("&#x27;", "&#39;") in report([run]).read_text()
        words = shlex.split(command)
        assert words[:3] == ["mmpre", "train", "bert"]
        _, asked = asked_of(words[2:], "mmpre train")
        record = read_record(run)
        assert asked.pop("options") == RunOptions(**record["options"])
        assert asked.pop("out") is None and asked.pop("scale") is None
        assert {name: json.loads(json.dumps(value)) for name, value in asked.items()}.items() <= record[
            "numbers"
        ].items()
        assert asked["steps"] == 8 and ("hide" in asked) == (run == two[1])


def test_the_command_speaks_of_switches_nothings_and_spaces(two):
    record = read_record(two[0])
    numbers = {"joint": True, "wra": 0.0, "sidecar": "a folder", "data": ["x y", "z"]}
    record |= {"recipe": {"name": "uniter", "digest": None, "file": None}, "numbers": numbers, "scale": "tiny"}
    account = read(two[0])
    assert account.found.name == "bert"
    words = shlex.split(again(record, find_recipe("uniter")))
    _, asked = asked_of(words[2:], "mmpre train")
    assert asked["scale"] == "tiny" and {name: asked[name] for name in ("joint", "wra")} == {"joint": True, "wra": 0.0}
    assert asked["sidecar"] == "a folder" and asked["data"] == ("x y", "z")


def test_curves_hold_every_logged_value(two):
    account = read(two[0])
    found = {group.title: {one.title: one for one in group.charts} for group in groups([account])}
    assert set(found) == {"mlm", "how it went"}
    assert set(found["mlm"]) == {"loss", "mlm_accuracy"}  # the single term is the loss
    course = ("learning rate", "gradient norm", "word picked", "throughput", "waiting for data")
    assert set(found["how it went"]) == set(course)
    lines = [json.loads(line) for line in (two[0] / "metrics.jsonl").read_text().splitlines()]
    trained, held_out = found["mlm"]["loss"].series
    assert trained.y_n.tolist() == [line["loss"] for line in lines if "task" in line]
    assert held_out.y_n.tolist() == [line["valid"]["mlm"]["loss"] for line in lines if "valid" in line]
    assert held_out.x_n.tolist() == [3, 7] and held_out.dots
    picked = found["how it went"]["word picked"].series[0]
    assert picked.y_n.tolist() == [line["picked"]["word"] for line in lines if "task" in line]


def test_several_runs_lie_over_each_other_and_their_differences_are_listed(two, tmp_path):
    out = report(two, tmp_path / "both.html")
    said = text_of(out)
    loss = groups([read(two[0], "a"), read(two[1], "b")])[0].charts[0]
    assert [(one.name, one.colour) for one in loss.series] == [
        ("a", 0),
        ("a, held out", 0),
        ("b", 1),
        ("b, held out", 1),
    ]
    rows = dict(differences([read(run) for run in two]))
    assert rows["hide"] == ["0.15", "0.4"]
    assert not {"steps", "data", "scale", "data of stage 1", "option seed"} & set(rows)
    assert "Where they differ" in said and "hide 0.15 0.4" in said
    assert "In nothing" in text_of(report([two[0], altered(two[0], tmp_path)], tmp_path / "same.html"))


def test_skipped_steps_restarts_and_holes_are_told(two, tmp_path):
    outcome = {"at": "2026-01-02T00:00:00+00:00", "finished": False, "step": 8, "rows": 40, "restarts": 1,
               "holes": {"broken <b>picture</b>": 7}, "skipped_steps": 1, "ledger": None}  # fmt: skip
    environment = read_record(two[0])["environment"]
    restarts = [{"at": "2026-01-01T00:00:00+00:00", "step": 4, "environment": environment}]
    run = altered(two[0], tmp_path, outcome=outcome, restarts=restarts)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 5, "task": "mlm", "loss": "nan", "skipped": True, "cause": "loss is nan"}) + "\n"
        )
    hole = {"step": 2, "cause": "broken", "shard": "a.tar", "key": EVIL, "member": "png", "detail": "cut off"}
    (run / "ledger.jsonl").write_text(json.dumps(hole) + "\n")
    account, said = read(run), text_of(report([run]))
    assert account.state[0] == "stopped" and "mmpre resume" in account.commands[1][1]
    assert "broken <b>picture</b> 7" in said and f"a.tar: {EVIL}.png cut off" in said and "ledger.jsonl" in said
    assert "5 loss is nan" in said and "at step 4" in said
    assert {(mark.kind, mark.x) for mark in account.marks} == {("restart", 4), ("skip", 5)}
    page_text = (run / "report.html").read_text()
    assert "<script>alert" not in page_text and "<b>picture" not in page_text


def test_stages_are_marked_where_they_begin(two):
    account = replace(read(two[0]), stages=(3, 2, 3))
    assert [(mark.x, mark.kind) for mark in account.marks] == [(3, "stage"), (5, "stage")]
    assert account.total == 8


def test_the_state_of_a_run_without_an_outcome(two, tmp_path):
    run = altered(two[0], tmp_path)
    record = json.loads((run / "run.json").read_text())
    del record["outcome"]
    (run / "run.json").write_text(json.dumps(record))
    assert read(run).state[0] == "ended early" and read(run).step == 8
    (run / "lock").touch()
    with (run / "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert read(run).state[0] == "running"
    (run / "metrics.jsonl").unlink()
    assert read(run).state[0] == "not begun"
    assert "Curves" not in text_of(report([run]))  # and a page is made all the same


@pytest.mark.parametrize("make, said", [
    (lambda path: path, "no such folder"), (lambda path: path.mkdir() or path, "has no run.json"),
])  # fmt: skip
def test_a_folder_that_is_no_run_is_refused(make, said, tmp_path, capsys):
    out = tmp_path / "page.html"
    with pytest.raises(RunError, match=said):
        report([make(tmp_path / "it")], out)
    with pytest.raises(SystemExit, match="2"):
        main(["report", str(tmp_path / "it"), "--out", str(out)])
    assert "is not a run" in capsys.readouterr().err and not out.exists()


def test_other_things_that_cannot_be_done_are_said(two, tmp_path):
    with pytest.raises(RunError, match="is a folder; name a file by --out"):
        report([two[0]], tmp_path)
    with pytest.raises(RunError, match="is named twice"):
        report([two[0], two[0]])
    with pytest.raises(RunError, match="name a run's folder"):
        report([])


def test_an_interrupted_command_leaves_the_old_page_and_nothing_else(tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    out.write_text("old")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        page.write(out, "new")
    assert out.read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_page_asks_for_nothing_from_elsewhere(two):
    text = report([two[0]]).read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", text) and "@import" not in text and "url(" not in text
    assert "default-src 'none'" in text


def test_throughput_is_taken_between_lines_and_over_restarts():
    def line(step, seconds, rate, waited):
        return {"step": step, "time": {"seconds": seconds, "tokens_per_second": rate, "waited": waited}}

    # 100 tokens in 1 s, then 300 in 1 s; a new session: 50 in 1 s
    lines = [line(0, 1.0, 100, 0.5), line(10, 2.0, 200, 0.5), {"step": 15}, line(20, 1.0, 50, 0.1)]
    assert list(_rates(lines)) == [(0, 100, 0.5), (10, 300, 0.0), (20, 50, 0.1)]


def test_a_long_line_is_drawn_by_buckets_with_its_extremes():
    x_n = np.arange(10_000.0)
    one = Series("loss", x_n, np.where(x_n == 5000, 9.0, 1.0))
    x, mean, low, high = one.drawn
    assert len(x) == chart.BUCKETS and x[-1] == 9999
    assert high.max() == 9 and low.min() == 1 and 1 < mean.max() < 1.2
    made = Chart("loss", "", [one], [Mark(3, "skip", "s")])
    assert made.banded and made.scales[0].band(one).endswith("Z")
    assert len(json.loads(made.points)[0][2]) == chart.BUCKETS
    assert [scale.name for scale in made.scales] == ["linear", "log"]


def test_axes_and_numbers():
    assert [text for _, text in Axis(0, 1, 0, 100).ticks] == ["0", "0.25", "0.5", "0.75", "1"]
    assert [text for _, text in Axis(1e-3, 1, 0, 100, log=True).ticks] == ["0.001", "0.01", "0.1", "1"]
    assert Axis(1, 100, 0, 10, log=True)(10) == 5
    assert [number(v) for v in (0, 0.25, 1234, 25_000, 3e6, 3.2e-5)] == ["0", "0.25", "1,234", "25k", "3M", "3.2e-5"]
    flat = Chart("lr", "", [Series("a", np.array([0.0]), np.array([2.0]))])  # a single point has a place too
    assert all(np.isfinite(v) for scale in flat.scales for place in scale.places(flat.series[0]) for v in place)


def test_what_was_measured_stands_beside_untrained_trivial_and_chance(two, tmp_path):
    def result(value, **more):
        return {"name": "<i>probe</i>", "value": value, "low": value - 0.1, "high": value + 0.1, "n": 1200} | more

    answer = {
        "step": 8, "data": ["held"], "sets": [], "seed": 3, "date": "2026-01-01",
        "protocol": {"interval": "by bootstrap"},
        "trained": {"tasks": {"mlm": {"loss": 1.5, "words": 1.5}}, "rows": 40, "results": [result(0.75, chance=0.25)]},
        "untrained": {"tasks": {"mlm": {"loss": 4.5}}, "rows": 40, "results": [result(0.5)]},
        "trivial": {"results": [result(0.375)]}, "gain": {"<i>probe</i>": {"value": 0.25, "low": 0.2, "high": 0.3}},
        "known": {"probe": "others: 0.8"}, "not measured": {"this": "no tower"},
    }  # fmt: skip
    run = altered(two[0], tmp_path)
    (run / "evaluation.json").write_text(json.dumps([answer | {"step": 4}, answer]))
    out = report([run])
    said = text_of(out)
    row = "<i>probe</i> 1,200 0.750 0.650 to 0.850 0.500 0.400 to 0.600 0.250 0.200 to 0.300 0.375 0.275 to 0.475 0.250"
    assert row in said and "<i>probe" not in out.read_text()
    assert "mlm, words" not in said
    assert "mlm, loss 40 1.500 4.500" in said and said.index("step 8, on held") < said.index("step 4, on held")
    assert "by bootstrap. Seed 3" in said and "Known of probe: others: 0.8" in said
    assert "Not measured: this (no tower)" in said
    old = {"step": 8, "trained": {"tasks": {}, "results": [result(0.75, chance=None)]}}
    (run / "evaluation.json").write_text(json.dumps([old]))
    assert "measure rows trained <i>probe</i>" in text_of(report([run]))  # no empty columns
    (run / "evaluation.json").write_text("[1]")
    assert "it is not what mmpre eval writes" in text_of(report([run]))
