"""Claims: arms with equal steps or FLOPs, taken up where they were, and verdicts by the rule."""

import json

import numpy as np
import pytest
from small_runs import pairs
from test_cli import run

from mmpre.claim import ClaimOptions, compare
from mmpre.claims import Against, Claim

RECIPE = '''
"""A claim about electra at a size of seconds."""
from mmpre.claims import Against, Claim
from mmpre.recipes.electra import electra

def small(data: tuple[str, ...] = (), valid: tuple[str, ...] = (), tokenizer: str = "bytes", learn: str = "all",
          steps: int = 6):
    return electra(data=data, valid=valid, tokenizer=tokenizer, learn=learn, steps=steps, width=16, depth=1, heads=2,
                   table=8, generator_width=8, generator_heads=1, length=16, positions=16, batch=4, micro_batches=1,
                   warmup=1, dropout=0.0, valid_every=100)

scales = {"tiny": {}}
claim = Claim(says="more is more", equal="flops", quick={"steps": 4}, against={
    "picked alone": Against(numbers={"learn": "picked"}, measure="electra: generator_accuracy"),
    "masked words": Against(numbers={"learn": "masked"}, measure="electra: loss", less=True),
})
'''


def test_the_verdict_is_by_the_interval_of_paired_differences():
    own = np.array([0.80, 0.70, 0.90])
    clear = compare(own, own - [0.10, 0.11, 0.09])
    assert clear["verdict"] == "reproduced" and clear["better by"] == pytest.approx(0.1)
    assert clear["high"] - clear["low"] == pytest.approx(2 * 4.3027 * 0.01 / 3**0.5, rel=1e-4)
    assert compare(own, own - [0.10, 0.11, 0.09], less=True)["verdict"] == "not reproduced"
    assert compare(own, own - [0.10, -0.11, 0.09])["verdict"] == "undecided"
    assert compare(own, own)["verdict"] == "undecided"


def test_a_claim_is_made_by_the_command_line_and_taken_up_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shards = pairs(tmp_path)
    (tmp_path / "small.py").write_text(RECIPE)
    words = ["claim", "small.py", "--quick", "--seeds", "2", "--data", *shards["data"], "--valid", *shards["valid"],
             "--tokenizer", str(tmp_path / "tokenizer.json"), "--out", "claims"]  # fmt: skip
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "more is more" in out and "picked alone" in out and "equal flops" in out
    told = json.loads((tmp_path / "claims/claim.json").read_text())
    arms = told["arms"]
    assert arms["own"]["steps"] == 4 < min(arms[name]["steps"] for name in told["compared"])
    for name in told["compared"]:
        assert arms[name]["flops"] == pytest.approx(arms["own"]["flops"], rel=0.15)
    for one in told["compared"].values():
        assert len(one["own"]) == len(one["other"]) == 2 and one["verdict"]
        assert one["low"] <= one["better by"] <= one["high"]
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "claims").rglob("metrics.jsonl")}
    assert len(made) == 6
    code, out, err = run(capsys, *words, "--json")
    assert code == 0 and json.loads(out) == told, err
    assert {path: path.stat().st_mtime_ns for path in made} == made
    code, out, err = run(capsys, *words, "--steps", "9")
    assert code == 2 and "made in another way: steps: 4 there, 9 here" in err and "another --out" in err, err


def test_what_cannot_be_claimed_is_told(capsys):
    code, _, err = run(capsys, "claim", "mae")
    assert code == 2 and "recipe mae states none; put `claim = Claim(...)` into its file" in err
    with pytest.raises(ValueError, match="wanted at least 2 seeds, got 1; one difference has no interval"):
        ClaimOptions(seeds=1)
    with pytest.raises(ValueError, match="wanted other arms, none called 'own'"):
        Claim(says="nothing", against={"own": Against(numbers={}, measure="x")})
