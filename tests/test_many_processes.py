"""Two processes do what one does: bit for bit in exact mode, within rounding by every way of joining gradients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from torchrun_jobs import carry_out

import mmpre
from mmpre.codes import Codebook
from mmpre.runs.metrics import read_metrics
from mmpre.runs.options import RunOptions

WAYS = {"sum": {"parallel": "sum"}, "ddp": {"parallel": "ddp"}, "fsdp": {"parallel": "fsdp"}, "exact": {"exact": True}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Melodies of unlike length; every third is no melody, so that some micro-batches are holes alone."""
    folder, rng = tmp_path_factory.mktemp("melodies"), np.random.default_rng(0)
    for split, count in (("train", 60), ("valid", 12)):
        with webdataset.ShardWriter(str(folder / f"{split}-%03d.tar"), verbose=0) as sink:
            for i in range(count):
                notes = " ".join(f"{rng.normal():.3f}" for _ in range(rng.integers(4, 12)))
                sink.write({"__key__": f"{split}{i:03d}", "notes": b"silence" if i % 3 == 1 else notes.encode()})
    return {split: (str(folder / f"{name}-000.tar"),) for split, name in (("data", "train"), ("valid", "valid"))}


def job(recipe, run, shards, **more):
    numbers = more.pop("numbers", {})
    return {"do": "train", "recipe": recipe, "run": str(run), "numbers": shards | numbers, **more}


OPTIONS = {"max_holes": 1.0}


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory):
    """All runs: alone here, and as two processes under one torchrun."""
    out = tmp_path_factory.mktemp("runs")
    alone, together = [], []
    for recipe in ("uneven", "twins"):
        alone += [job(recipe, out / f"{recipe}-alone", shards, options=OPTIONS)]
        alone += [job(recipe, out / f"{recipe}-alone-exact", shards, options=OPTIONS | {"exact": True})]
        together += [job(recipe, out / f"{recipe}-{way}", shards, options=OPTIONS | o) for way, o in WAYS.items()]
    bf16 = OPTIONS | {"precision": "bf16"}
    alone += [job("uneven", out / "uneven-alone-bf16", shards, options=bf16)]
    together += [job("uneven", out / f"uneven-{way}-bf16", shards, options=bf16 | WAYS[way]) for way in ("ddp", "fsdp")]
    stop = {"numbers": {"stop_at": 4}}
    alone += [job("uneven", out / "from-one", shards, options=OPTIONS, **stop)]
    together += [job("uneven", out / "from-two", shards, options=OPTIONS | WAYS["fsdp"], **stop)]
    alone += [{"do": "codes", "run": str(out / "codes-alone")}]
    together += [{"do": "codes", "run": str(out / "codes-shared")}]
    for one in alone:
        carry_out(one)
    together += [{"do": "resume", "run": str(out / "from-one"), "options": WAYS["fsdp"]}]
    (out / "jobs.json").write_text(json.dumps(together))
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(tests / "torchrun_jobs.py"), str(out / "jobs.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests)},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    carry_out({"do": "resume", "run": str(out / "from-two"), "options": {"parallel": "auto"}})
    return out


def lines(run):
    return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(run / "metrics.jsonl")]


def weights(run):
    return mmpre.load(run).checkpoint.tensors


def assert_alike(one, other, tolerance=1e-4):
    one_lines, other_lines = lines(one), lines(other)
    assert len(one_lines) == len(other_lines) >= 8
    for a, b in zip(one_lines, other_lines, strict=True):
        assert a.keys() == b.keys()
        assert {k: a[k] for k in a if k in ("step", "task", "tokens", "rows")} == {
            k: b[k] for k in a if k in ("step", "task", "tokens", "rows")
        }
        for name in ("loss", "norm", "valid_loss"):
            assert a.get(name, 0.0) == pytest.approx(b.get(name, 0.0), rel=tolerance, abs=1e-9), (a, b)
    one, other = weights(one), weights(other)
    for part in ("model", "optimizer"):
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            torch.testing.assert_close(other[part][name], value, rtol=10 * tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("way", ["sum", "ddp", "fsdp"])
@pytest.mark.parametrize("recipe", ["uneven", "twins"])
def test_two_processes_do_what_one_does_within_rounding(runs, recipe, way):
    assert_alike(runs / f"{recipe}-alone", runs / f"{recipe}-{way}")


@pytest.mark.parametrize("recipe", ["uneven", "twins"])
def test_two_processes_do_bit_for_bit_what_one_does_in_exact_mode(runs, recipe):
    one, other = runs / f"{recipe}-alone-exact", runs / f"{recipe}-exact"
    assert lines(one) == lines(other)
    one, other = weights(one), weights(other)
    assert all(torch.equal(other[part][name], value) for part in one for name, value in one[part].items())


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_in_bf16_they_agree_as_far_as_it_rounds(runs, way):
    assert_alike(runs / "uneven-alone-bf16", runs / f"uneven-{way}-bf16", tolerance=2e-2)


@pytest.mark.parametrize("run", ["from-one", "from-two"])
def test_a_run_goes_on_with_other_processes_and_whole_or_shared_parameters(runs, run):
    assert_alike(runs / "uneven-alone", runs / run)


def test_idle_codes_move_alike_where_processes_share_the_codebook(runs):
    alone, shared = (torch.load(runs / f"codes-{way}", weights_only=True) for way in ("alone", "shared"))
    torch.manual_seed(0)
    began_KC = Codebook(6, 4).vector_KC
    assert (alone["vectors"] != began_KC).any(1).nonzero().squeeze(1).tolist() == [1, 4]
    assert all(torch.equal(alone[name], shared[name]) for name in alone)


@pytest.mark.parametrize("way", ["alone", "sum", "ddp", "fsdp", "exact"])
def test_what_no_task_used_or_the_stage_froze_is_as_it_began(runs, way):
    opened = mmpre.load(runs / f"uneven-{way}")
    trained, began = opened.checkpoint.tensors["model"], opened.untrained().module().state_dict()
    still = {name for name in began if torch.equal(trained[name], began[name])}
    assert still == {name for name in began if name.startswith("unused.") or "blocks.0." in name}


def test_the_data_did_hold_what_is_hard(runs):
    """Micro-batches without a row, and norms over the clip."""
    steps = [line for line in lines(runs / "uneven-alone") if "loss" in line]
    assert min(line["rows"] for line in steps) <= 2 and max(line["norm"] for line in steps) > 2.0
    assert {line["task"] for line in steps} == {"pitch0", "pitch1"}


def test_ways_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="parallel must be one of auto, sum, ddp, fsdp, got 'fdsp'"):
        RunOptions(parallel="fdsp")
    with pytest.raises(ValueError, match="exact adds gradients in float64 itself and cannot go with parallel 'ddp'"):
        RunOptions(exact=True, parallel="ddp")
