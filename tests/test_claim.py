"""Claims: arms with equal steps or FLOPs in processes of their own, taken up where they were, and how they are told."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from xml.etree import ElementTree

import numpy as np
import pytest
from small_runs import pairs
from test_cli import run

from mmpre.claims import Against, Claim, Measure
from mmpre.claims.claim import ClaimOptions, NoResultError, _value, compare
from mmpre.claims.page import drawn, page

RECIPE = '''
"""A claim about electra at a size of seconds."""
from mmpre.claims import Against, Before, Claim, Measure
from mmpre.recipes.electra import electra

def small(data: tuple[str, ...] = (), valid: tuple[str, ...] = (), tokenizer: str = "bytes", learn: str = "all",
          hide: float = 0.15, start: str = "", steps: int = 6):
    return electra(data=data, valid=valid, tokenizer=tokenizer, learn=learn, hide=hide, steps=steps, width=16, depth=1,
                   heads=2, table=8, generator_width=8, generator_heads=1, length=16, positions=16, batch=4,
                   micro_batches=1, warmup=1, dropout=0.0, valid_every=100)

scales = {"tiny": {}}
claim = Claim(says="more is more", equal="flops", quick={"steps": 4}, against={
    "masked words": Against(numbers={"learn": "masked"}, measure=(
        Measure("electra: loss", less=True), Measure("electra: loss", less=True, margin=90.0),
        Measure("a task of other data"))),
})
'''
BEFORE = RECIPE.replace(
    "claim = Claim(",
    """claim = Claim(
    before=Before(number="start", recipe="bert", quick=dict(
        steps=STEPS, width=16, depth=2, heads=2, length=16, batch=4, warmup=1, valid_every=100)),""",
)


def test_the_verdict_is_by_the_interval_of_paired_differences():
    own = np.array([0.80, 0.70, 0.90])
    clear = compare(own, own - [0.10, 0.11, 0.09])
    assert clear["verdict"] == "reproduced" and clear["better by"] == pytest.approx(0.1)
    assert clear["high"] - clear["low"] == pytest.approx(2 * 4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert compare(own, own - [0.10, 0.11, 0.09], less=True)["verdict"] == "not reproduced"
    assert compare(own, own - [0.10, -0.11, 0.09])["verdict"] == "undecided"
    assert compare(own, own)["verdict"] == "undecided"


def test_a_margin_allows_the_papers_way_to_be_so_much_worse():
    own = np.array([0.80, 0.70, 0.90])
    worse = own + np.array([0.010, 0.011, 0.009])
    assert compare(own, worse)["verdict"] == "not reproduced"
    assert compare(own, worse, margin=0.011)["verdict"] == "undecided"
    assert compare(own, worse, margin=0.02)["verdict"] == "reproduced"


def test_a_measure_is_found_by_whole_words_and_its_mean_taken():
    def result(name, value):
        return {"name": name, "value": value}

    results = [result("a to b R@1", 0.1), result("b to a R@1", 0.3), result("a to b R@10", 0.9), result("rank", 5.0)]
    answer = {"trained": {"tasks": {"mlm": {"loss": 2.0}}, "results": results}}
    assert _value(answer, "R@1") == pytest.approx(0.2) and _value(answer, "R@10") == 0.9
    assert _value(answer, "mlm: loss") == 2.0
    with pytest.raises(NoResultError, match=r"no result has 'R@5' in its name; there are mlm: loss; a to b R@1"):
        _value(answer, "R@5")


def words_of(tmp_path, recipe=RECIPE):
    shards = pairs(tmp_path)
    (tmp_path / "small.py").write_text(recipe)
    return ["claim", "small.py", "--quick", "--seeds", "2", "--data", *shards["data"], "--valid", *shards["valid"],
            "--tokenizer", str(tmp_path / "tokenizer.json"), "--out", "claims"]  # fmt: skip


def test_a_claim_is_made_by_the_command_line_and_taken_up_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [*words_of(tmp_path), "--out-page", "docs/small"]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "more is more" in out and "masked words" in out and "Equal FLOPs" in out
    told = json.loads((tmp_path / "claims/claim.json").read_text())
    own, other = told["arms"]["own"], told["arms"]["masked words"]
    assert own["steps"] == 4 < other["steps"] and not told["same steps"]
    assert other["flops"] == pytest.approx(own["flops"], rel=0.15)
    assert told["flops differ by"] == pytest.approx(abs(other["flops"] / own["flops"] - 1))
    assert all(len(arm["seconds"]) == 2 and min(arm["seconds"]) > 0 for arm in told["arms"].values())
    assert [(one["measure"], one["less"], one["margin"]) for one in told["compared"]] == [
        ("electra: loss", True, 0.0),
        ("electra: loss", True, 90.0),
    ]
    assert told["compared"][1]["verdict"] == "reproduced"  # by that margin
    for one in told["compared"]:
        assert len(one["own"]) == len(one["other"]) == 2 and one["verdict"]
        assert one["low"] <= one["better by"] <= one["high"]
    (missing,) = told["not measured"].items()
    assert missing[0] == "masked words: a task of other data" and "there are electra: loss" in missing[1]
    for kind in ("json", "md", "svg"):
        assert (tmp_path / f"docs/small.{kind}").exists() and (tmp_path / f"claims/claim.{kind}").exists()
    written = (tmp_path / "docs/small.md").read_text()
    assert "(small.svg)" in written and told["made"]["command"] in written and "learn masked" in written
    assert "Not measured: masked words: a task of other data (claim: no result has" in written
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "claims").rglob("metrics.jsonl")}
    assert len(made) == 4
    code, out, err = run(capsys, *words, "--json")
    assert code == 0 and json.loads(out) == told, err
    assert {path: path.stat().st_mtime_ns for path in made} == made
    with monkeypatch.context() as patch:
        patch.setattr(Against, "measures", property(lambda self: (Measure("a task of other data"),)))
        code, _, err = run(capsys, *words)
    assert code == 2 and "no result has 'a task of other data' in its name; there are electra: loss" in err, err
    data, valid = (words.index(flag) + 1 for flag in ("--data", "--valid"))
    code, _, err = run(capsys, *words[:valid], words[data], *words[valid + 1 :])
    assert code == 2 and f"was made in another way: valid: ['{words[valid]}'] there" in err, err
    code, _, err = run(capsys, *words, "--on", str(tmp_path))
    assert code == 2 and "claim: --on names sets whose tasks are measured, but small's claim measures none" in err, err
    code, out, err = run(capsys, *words, "--steps", "6")  # what holds where it is not --quick
    assert code == 2 and "made in another way: steps: 4 there, 6 here" in err, err
    code, out, err = run(capsys, *words, "--steps", "9")
    assert code == 2 and "made in another way: steps: 4 there, 9 here" in err and "another --out" in err, err


def test_an_arm_that_fails_is_named_and_the_others_are_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = words_of(tmp_path, RECIPE.replace('"learn": "masked"', '"learn": "masked", "hide": 1.5'))
    monkeypatch.setattr("mmpre.claims.claim._flops", lambda *_: 1.0)  # which would be told first
    code, _, err = run(capsys, *words)
    assert code == 2 and "claim: 2 of 4 runs failed; the others are kept" in err, err
    assert "masked words, seed 0: mmpre: ExactShare: share must" in err and "masked-words-0.log" in err, err
    for seed in (0, 1):
        assert json.loads((tmp_path / f"claims/own-{seed}/run.json").read_text())["outcome"]["finished"]
        assert (tmp_path / f"claims/own-{seed}/evaluation.json").exists()


def test_all_runs_stop_and_are_saved_when_the_claim_is_stopped_and_the_same_command_goes_on(tmp_path):
    recipe = RECIPE.replace('quick={"steps": 4}', 'quick={"steps": 100_000}')
    command = [sys.executable, "-m", "mmpre", *words_of(tmp_path, recipe)]
    child = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    logs = [tmp_path / f"claims/{name}-0/metrics.jsonl" for name in ("own", "masked-words")]
    deadline = time.monotonic() + 120
    while not all(log.exists() and log.stat().st_size for log in logs) and time.monotonic() < deadline:
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "the same command goes on" in err, err
    assert re.search(r"0 of 4 runs done; own, seed 0: step \d", err), err
    for log in logs:
        outcome = json.loads((log.parent / "run.json").read_text())["outcome"]
        assert not outcome["finished"] and 0 < outcome["step"] < 100_000
        assert (log.parent / f"checkpoints/step-{outcome['step']:08d}").is_dir()
    if hasattr(os, "killpg"):
        with pytest.raises(ProcessLookupError):
            os.kill(json.loads((logs[0].parent / "lock").read_text())["pid"], 0)


@pytest.mark.slow
def test_the_arms_of_a_seed_start_from_a_run_that_is_made_before(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, *words_of(tmp_path, BEFORE.replace("STEPS", "3")))
    assert code == 0, err
    told = json.loads((tmp_path / "claims/claim.json").read_text())
    assert told["before"]["recipe"] == "bert" and told["before"]["steps"] == 3
    for seed in (0, 1):
        for arm in ("own", "masked-words"):
            numbers = json.loads((tmp_path / f"claims/{arm}-{seed}/run.json").read_text())["numbers"]
            assert numbers["start"] == f"claims/before-{seed}"
        record = json.loads((tmp_path / f"claims/before-{seed}/run.json").read_text())
        assert record["recipe"]["name"] == "bert" and record["options"]["seed"] == seed
        assert not (tmp_path / f"claims/before-{seed}/evaluation.json").exists()
    assert "start from a run of `bert`" in (tmp_path / "claims/claim.md").read_text()


def test_the_page_and_its_picture_tell_every_comparison():
    own, other = [0.5, 0.6, 0.7], [0.4, 0.55, 0.58]
    one = {"against": "<other> way", "measure": "a measure", "less": False, "margin": 0.1}
    arm = {"recipe": "x", "scale": "tiny", "numbers": {}, "steps": 3, "flops of a step": 2.0, "flops": 6.0,
           "seconds": [1.0, 2.0, 3.0]}  # fmt: skip
    told = {
        "recipe": "x", "scale": "tiny", "says": "so", "equal": "steps", "rule": "by rule", "seeds": 3, "quick": False,
        "numbers": {"data": ["a", "b"]}, "same steps": True, "flops differ by": 0.004, "before": None,
        "arms": {"own": arm, "<other> way": {**arm, "numbers": {"learn": "less"}}},
        "compared": [{**one, **compare(np.array(own), np.array(other), margin=0.1)}],
        "made": {"command": "mmpre claim x", "commits": ["abc"], "machine": "1 core", "torch": "2", "at once": 2,
                 "threads": 1, "date": "today"},
    }  # fmt: skip
    svg = ElementTree.fromstring(drawn(told))
    name = "{http://www.w3.org/2000/svg}"
    dots = [one for one in svg.iter(f"{name}circle") if one.get("class") in ("own", "other")]
    assert len(dots) == 6
    places = [float(dot.get("cx")) for dot in dots]
    values = [*own, *other]
    assert np.corrcoef(places, values)[0, 1] == pytest.approx(1, abs=1e-4)
    assert all(0 < place < 720 for place in places)
    text = " ".join(svg.itertext())
    assert "<other> way" in text and "may be worse by 0.1" in text and "reproduced" in text
    written = page(told, "x")
    assert "Equal steps, FLOPs within 0.4 %." in written and "| <other> way | learn less | 3 | 6 | 2 |" in written
    assert "0.6000 ± 0.1000" in written and "data a b" in written


def test_what_cannot_be_claimed_is_told(capsys):
    code, _, err = run(capsys, "claim", "mae")
    assert code == 2 and "recipe mae states none; put `claim = Claim(...)` into its file" in err
    with pytest.raises(ValueError, match="wanted at least 2 seeds, got 1; one difference has no interval"):
        ClaimOptions(seeds=1)
    with pytest.raises(ValueError, match="at_once must be at least 1, got 0"):
        ClaimOptions(at_once=0)
    with pytest.raises(ValueError, match=r"margin must not be negative, got -0\.1; 0\.01 allows so much worse"):
        Measure("x", margin=-0.1)
    with pytest.raises(ValueError, match="wanted other arms, none called 'own'"):
        Claim(says="nothing", against={"own": Against(numbers={}, measure="x")})
