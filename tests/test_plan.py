"""What a plan says of a recipe is what a run of it then takes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity_text import some_samples
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from webdataset import ShardWriter

import mmpre
from mmpre.batch import pack
from mmpre.command_line.cli import main
from mmpre.data.audio import Audio
from mmpre.data.sample import Sample
from mmpre.draw import Draw
from mmpre.heads.pool import First, Tower
from mmpre.modalities.dna import DnaReader
from mmpre.modalities.image_patches import ImageReader
from mmpre.modalities.regions import RegionReader
from mmpre.modalities.speech import FbankReader, WaveReader
from mmpre.modalities.text import ErasedText, TextReader
from mmpre.modalities.timm_images import SquareReader
from mmpre.modalities.video import VideoReader
from mmpre.objectives.contrast import Contrast, InfoNCE
from mmpre.plan import PlanError, PlanOptions, plan
from mmpre.plan.trace import _COUNTS
from mmpre.plugins import find_recipe
from mmpre.recipe import Recipe, Task
from mmpre.recipes.bert import bert
from mmpre.runs.options import RunOptions

TONES = Path(__file__).parent / "tones.py"
SMALL = dict(width=64, depth=2, heads=4, length=64, batch=16, micro_batches=1, steps=8, warmup=1, dropout=0.0)


@pytest.mark.parametrize("recipe", ["bert", "mae", "masked", "mosaicbert", "two_stage", "two_towers", "uniter"])
def test_parameters_are_exact_and_every_task_of_every_recipe_can_be_planned(recipe):
    told = plan(recipe, scale="tiny")
    module = find_recipe(recipe).build(find_recipe(recipe).numbers("tiny", {})).module()
    assert told["parameters"]["total"] == sum(p.numel() for p in module.parameters())
    assert sum(told["parameters"]["parts"].values()) == told["parameters"]["total"]
    for stage in told["stages"]:
        assert stage["rows_are"] == "made up, as long as rows get" and stage["flops"] > 0
        (held,) = stage["memory"].values()
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        assert held["gradients"] == 4 * trained and held["moments"] == 8 * trained + 4 * len(list(module.parameters()))
        assert held["activations"] > 0


def test_flops_are_those_of_a_step_that_is_really_run():
    told = plan(bert, **SMALL)
    recipe = bert(**SMALL)
    (task,) = recipe.stages[0].tasks
    sample = Sample("a", "s", "d", task.objective.readers["text"].made())
    rows = [
        task.view.row(sample, task.objective.readers, Draw.row(0, 0, 0, epoch=0, unit=i), lambda role, k: sample)
        for i in range(16)
    ]
    batch = pack(rows, task.view.attend.plan)
    assert told["stages"][0]["tokens"] == batch.layout.size == 16 * 63  # whole words of two bytes, [CLS] and [SEP]
    with FlopCounterMode(display=False, custom_mapping=_COUNTS) as counted:
        task.objective(batch, Draw.micro_batch(0, 0, 0, 0)).total(batch.counts).backward()
    # as many tokens are picked but for chance
    assert told["stages"][0]["flops"] == pytest.approx(counted.get_total_flops(), rel=0.02)


def measured(tmp_path, recipe, scale=None, precision="fp32", **numbers):
    """Bytes that torch's allocator held at most while a run trained, as its profiler saw them."""
    made = {}
    for stage in find_recipe(recipe).build(find_recipe(recipe).numbers(scale, numbers)).stages:
        for task in stage.tasks:
            for reader in task.readers:
                made |= reader.made()
    with ShardWriter(str(tmp_path / "s-%03d.tar"), verbose=0) as sink:
        for i in range(70):
            sink.write({"__key__": f"k{i}"} | made)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        mmpre.train(recipe, scale=scale, out=tmp_path / "run", data=(str(tmp_path),),
                    options=RunOptions(workers=0, precision=precision), **numbers)  # fmt: skip
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("recipe", "numbers"),
    [
        pytest.param("bert", dict(width=128, depth=2, length=128, batch=32, micro_batches=2), id="two parts"),
        pytest.param("mae", dict(width=64, depth=2, batch=32), id="small mae"),
        pytest.param("bert", dict(width=64, depth=2, dropout=0.1), id="dropout"),
        pytest.param("bert", {}, marks=pytest.mark.slow),
        pytest.param("mosaicbert", {}, marks=pytest.mark.slow),
        pytest.param("mae", {}, marks=pytest.mark.slow),
        pytest.param("uniter", {}, marks=pytest.mark.slow),
    ],
)
def test_memory_is_within_15_percent_of_a_measured_run(recipe, numbers, precision, tmp_path):
    numbers = numbers | dict(steps=4, warmup=1)
    told = plan(recipe, scale="tiny", options=PlanOptions(device="cpu", precision=precision), **numbers)
    planned = sum(told["stages"][0]["memory"]["alone"].values())
    found = measured(tmp_path, recipe, "tiny", precision, **numbers)
    print(f"{recipe}: planned {planned:,}, measured {found:,}: {planned / found - 1:+.1%}")
    assert planned == pytest.approx(found, rel=0.15)


def test_several_gpus_share_what_they_can_and_what_fits_is_told():
    options = PlanOptions(gpus=4, gpu_memory=0.004, samples=320, flops=1e12, utilisation=0.5)
    (stage,) = plan(bert, options=options, **SMALL | dict(micro_batches=4))["stages"]
    ddp, fsdp = stage["memory"]["ddp"], stage["memory"]["fsdp"]
    assert ddp["buckets"] == ddp["gradients"] and ddp["moments"] / 4 < fsdp["moments"] < 1.02 * ddp["moments"] / 4
    assert "unshared" not in fsdp  # a part for each GPU
    assert fsdp["activations"] == ddp["activations"] and fsdp["gathered"] > 0
    assert stage["fits"] == {"ddp": sum(ddp.values()) <= 4e6, "fsdp": sum(fsdp.values()) <= 4e6}
    assert stage["data"] == {"shards": None, "rows_of_an_epoch": 320, "steps_of_an_epoch": 20.0, "epochs": 0.4}
    assert stage["seconds_of_a_step"] == pytest.approx(stage["flops"] / 2e12)
    assert stage["seconds"] == pytest.approx(8 * stage["seconds_of_a_step"])
    half = plan(bert, options=replace(options, precision="bf16"), **SMALL | dict(micro_batches=4))["stages"][0]
    assert half["flops"] == stage["flops"]
    assert 0.4 * ddp["activations"] < half["memory"]["ddp"]["activations"] < 0.8 * ddp["activations"]


def test_a_contrastive_step_holds_one_part_and_all_features():
    def pairs(width: int = 32, micro_batches: int = 2) -> Recipe:
        made = bert(**SMALL | dict(width=width, micro_batches=micro_batches))
        tower = Tower(made.network, First("text"))
        task = Task("pairs", {"a": made.stages[0].tasks[0].view, "b": made.stages[0].tasks[0].view},
                    Contrast({"a": tower, "b": tower}, InfoNCE(0.1)))  # fmt: skip
        return Recipe([replace(made.stages[0], tasks=[task])], made.network)

    one, two = (plan(pairs, micro_batches=count)["stages"][0] for count in (1, 2))
    assert one["flops"] == pytest.approx(two["flops"], rel=0.02)
    assert 0.4 < two["tasks"]["pairs"]["activations"] / one["tasks"]["pairs"]["activations"] < 0.8


def test_rows_of_real_data_are_taken_where_the_recipe_names_some(tmp_path):
    with ShardWriter(str(tmp_path / "s-%03d.tar"), verbose=0) as sink:
        for sample in some_samples(20):
            sink.write({"__key__": sample.key, "txt": sample.members["txt"]})
    (stage,) = plan(bert, data=(str(tmp_path),), **SMALL)["stages"]
    assert stage["rows_are"] == "the data's" and stage["tokens"] < 16 * 45
    assert stage["data"]["shards"] == 1 and stage["data"]["epochs"] == 16 * 8 / 20
    (tmp_path / "notes").mkdir()
    with pytest.raises(PlanError, match=r"ToneReader cannot make up a sample \(made\); name some shards by --data"):
        plan(TONES)
    with ShardWriter(str(tmp_path / "notes" / "s-%03d.tar"), verbose=0) as sink:
        for i in range(40):
            sink.write({"__key__": f"{i}", "notes": "1 2 3"})
    assert plan(TONES, data=(str(tmp_path / "notes"),))["stages"][0]["tokens"] > 0


@pytest.mark.parametrize(
    ("reader", "longest"),
    [
        (TextReader(max_length=33), 33),
        (ErasedText(TextReader(max_length=64)), 63),
        (ImageReader(8, max_patches=30), 26),
        (SquareReader(64, 32), 4),
        (RegionReader(8, 3, max_regions=5), 5),
        (DnaReader(length=30), 32),
        (FbankReader(Audio(seconds=1.0)), 49),
        (WaveReader(Audio(seconds=1.0)), 49),
        (VideoReader(patch_px=16, max_patches=16), 1 + 4 * 16),
    ],
)
def test_readers_make_up_a_sample_that_fills_a_row(reader, longest):
    tokens = reader.tokenize(Sample("made", "s", "d", reader.made()), Draw.row(0, 0, 0, epoch=0, unit=0))
    assert abs(len(tokens) - longest) <= (4 if isinstance(reader, ErasedText) else 0)


def test_the_command_tells_it_in_lines_and_in_json(capsys):
    words = ["plan", "bert", "--scale", "tiny", "--batch", "16", "--gpu-memory", "0.02", "--samples", "160"]
    main(words)
    told = capsys.readouterr().out
    assert "bert, scale tiny, 1 GPU, fp32\nparameters 860,163 (" in told
    assert "does not fit (parameters 3.44 MB, gradients 3.44 MB, moments 6.88 MB" in told
    assert "micro-batches (a number of the recipe)" in told
    assert "160 rows of an epoch: 10.0 steps each, 200.00 epochs" in told
    main([*words, "--json", "--flops", "1e12"])
    told = json.loads(capsys.readouterr().out)
    assert told["stages"][0]["batch"] == 16 and told["stages"][0]["fits"] == {"alone": False}
    main([*words, "--device", "cpu", "--gpus", "1", "--precision", "bf16"])
    told = capsys.readouterr().out
    assert "bert, scale tiny, 1 process, bf16" in told and "memory of one process" in told and "GPU" not in told
    with pytest.raises(SystemExit):
        main(["plan"])
    main(["plan", "--help"])
    assert "usage: mmpre plan RECIPE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bert", "--scale", "huge"], "recipe bert has no scale 'huge'"),
        (["bert", "--scale", "tiny", "--gpus", "2"], "2 processes cannot share 1 micro-batches a step evenly; use one"),
        (
            ["bert", "--precision", "fp8", "--utilisation", "2"],
            "must be fp32 or bf16, got 'fp8'; utilisation",
        ),
        (["bert", "--gpus", "0"], "gpus must be above 0, got 0"),
        (["bert", "--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["bert", "--data", "nowhere/*.tar"], "nowhere/*.tar: matches no file"),
        (["bert", "--width", "30"], "width must be a multiple of heads, got width 30 and 12 heads"),
    ],
)
def test_what_cannot_be_planned_is_told(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["plan", *words])
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_a_step_that_needs_numbers_is_refused_with_the_way_out():
    class Asks(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.readers = inner, inner.readers

        def forward(self, batch, draw):
            loss = self.inner(batch, draw)
            return loss if loss.terms[0].sum > 0 else None

    def asking(width: int = 32) -> Recipe:
        made = bert(**SMALL | dict(width=width))
        task = Task("asks", made.stages[0].tasks[0].view, Asks(made.stages[0].tasks[0].objective))
        return Recipe([replace(made.stages[0], tasks=[task])], made.network)

    with pytest.raises(PlanError, match=r"task asks cannot be run on shapes alone: .* Measure a short run instead"):
        plan(asking)


def test_what_two_processes_hold_is_exact_and_its_peak_within_15_percent(tmp_path):
    """Under DDP and FSDP2 over gloo, in both precisions; each process has two parts of a step."""
    numbers = dict(width=128, depth=2, length=128, batch=32, micro_batches=4, steps=3, warmup=1)
    with ShardWriter(str(tmp_path / "s-%03d.tar"), verbose=0) as sink:
        for i in range(70):
            sink.write({"__key__": f"k{i}"} | TextReader(max_length=128).made())
    ways = [(way, precision) for way in ("ddp", "fsdp") for precision in ("fp32", "bf16")]
    jobs = [
        {"recipe": "bert", "scale": "tiny", "run": str(tmp_path / "-".join(one)),
         "options": {"parallel": one[0], "precision": one[1]},
         "numbers": numbers | {"data": [str(tmp_path / "s-000.tar")]}}
        for one in ways
    ]  # fmt: skip
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         str(Path(__file__).with_name("torchrun_memory.py")), str(tmp_path / "jobs.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    for (way, precision), job in zip(ways, jobs, strict=True):
        options = PlanOptions(gpus=2, device="cpu", precision=precision)
        planned = plan("bert", scale="tiny", options=options, **numbers)["stages"][0]["memory"][way]
        held = json.loads(Path(f"{job['run']}-0.json").read_text())
        assert {name: planned[name] for name in ("parameters", "gradients", "moments")} == {
            name: held[name] for name in ("parameters", "gradients", "moments")
        }
        print(f"{way} {precision}: planned {sum(planned.values()):,}, measured {held['peak']:,}: "
              f"{sum(planned.values()) / held['peak'] - 1:+.1%}")  # fmt: skip
        assert sum(planned.values()) == pytest.approx(held["peak"], rel=0.15)


def test_the_flops_of_a_batch_that_grows_are_those_of_its_rows():
    numbers = dict(steps=40, warmup=2, cooldown=2, masked=3, batch=64, micro_batches=1)
    even, grown = (plan("babylm2", scale="tiny", growth=growth, **numbers)["stages"] for growth in (1, 4))
    for one in even:
        assert one["flops_in_all"] == pytest.approx(one["flops"] * one["steps"])
    # the first stage, 70 percent of the steps, grows from a quarter of its rows
    share = grown[0]["flops_in_all"] / (even[0]["flops_in_all"])
    assert share == pytest.approx(0.25 + 0.75 * 0.35, abs=0.03)
