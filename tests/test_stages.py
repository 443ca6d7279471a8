"""Stages take over what they say and nothing else; averages follow; ramps of the batch are closed forms."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import webdataset
from tones import NextPitch, Tones
from torch import nn

import mmpre
from mmpre.data.loader import MicroBatches, slots
from mmpre.encoder import bert_encoder
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.runs.checkpoint import of_run
from mmpre.runs.metrics import read_metrics
from mmpre.runs.options import RunOptions
from mmpre.runs.run import RunError, open_units
from mmpre.runs.starts import Carry, Copied, FromRun
from mmpre.schedules import BatchRamp, Constant, Linear, LinearRamp
from mmpre.training.average import Average
from mmpre.training.optim import LAMB, AdamW
from mmpre.view import View

OPTIONS = RunOptions(exact=True, workers=0, log_every=1, save_every=4)
ALL = Carry(optimizer=True, schedule=True, data=True)


@pytest.fixture(scope="module")
def melodies(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("melodies"), np.random.default_rng(0)
    with webdataset.ShardWriter(str(folder / "m-%03d.tar"), maxcount=100, verbose=0) as sink:
        for i in range(60):
            notes = " ".join(f"{rng.normal() + 0.2 * n:.3f}" for n in range(rng.integers(4, 12)))
            sink.write({"__key__": f"m{i:03d}", "notes": notes.encode()})
    return (str(folder),)


def a_task(net):
    view = View(picks={"note": RandomTokens(role="tones", rate=0.3)}, corruption=HideAll())
    return Task("pitch", view, OnePass(net, [Predict("note", NextPitch(16))]))


def a_net():
    return Network({"tones": Tones(16)}, bert_encoder(16, 1, 2, dropout=0.0))


def a_stage(net, task=None, **more):
    numbers = dict(data=("m.tar",), steps=6, batch=8, optimizer=AdamW(lr=1e-2, schedule=Constant()))
    return Stage(tasks=[task or a_task(net)], **numbers | more)


def two_of_them(
    data: tuple[str, ...] = (), carry: str = "", split: int = 6, start: str = "", teach: bool = False,
    optimizer: str = "", frozen: bool = False,
) -> Recipe:  # fmt: skip
    """Twelve steps, the last of them in a second stage with the same task, which carries over what is named."""
    net = a_net()
    task, schedule = a_task(net), Linear(warmup=2, total=13)
    stages = [
        a_stage(net, task, data=data, steps=steps, optimizer=AdamW(lr=1e-2, schedule=schedule), **more)
        for steps, more in (
            (split, {}),
            (12 - split, {
                "carry": Carry(**{name: True for name in carry.split()}),
                "start": [Copied(source=part.split(">")[0], into=part.split(">")[1]) for part in start.split()],
                "frozen": (lambda name: "teacher" in name) if frozen else (lambda name: False),
            }),
        )
        if steps
    ]  # fmt: skip
    modules = {"average": Average(net, 0.9)} if teach else {}
    return Recipe(stages, net, modules | ({"teacher": a_net()} if start else {}))


def weights(run, part="network"):
    return {n: t for n, t in of_run(run).tensors["model"].items() if n.startswith(part)}


def rates(run):
    return [line["lr"] for line in read_metrics(run / "metrics.jsonl") if "lr" in line]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_of(tmp_path, data, name="run", **numbers):
    return mmpre.train(two_of_them, out=tmp_path / name, options=OPTIONS, data=data, **numbers)


def test_a_stage_that_carries_all_over_goes_on_as_if_there_were_one(melodies, tmp_path):
    """Masks are drawn by stage, so the stages are cut where the tokens that are hidden do not matter: the optimizer."""
    split = run_of(tmp_path, melodies, carry="optimizer schedule data")
    cut = run_of(tmp_path, melodies, "cut", carry="schedule data")
    whole = run_of(tmp_path, melodies, "whole", split=12)
    assert rates(split) == rates(whole) and len(rates(whole)) == 12
    moments = of_run(split).tensors["optimizer"]
    assert {t.item() for n, t in moments.items() if n.endswith("/step")} == {12.0}
    moments = of_run(cut).tensors["optimizer"]
    assert {t.item() for n, t in moments.items() if n.endswith("/step")} == {6.0}
    assert not equal(weights(split), weights(cut))


def test_a_stage_that_carries_nothing_starts_its_schedule_anew(melodies, tmp_path):
    run = run_of(tmp_path, melodies)
    assert rates(run)[:6] == rates(run)[6:]


def test_rows_go_on_where_the_stage_before_stopped_and_none_comes_twice(melodies):
    net = a_net()
    stages = [
        a_stage(net, data=melodies, steps=3, ramp=BatchRamp(first=4, steps=2)),
        a_stage(net, data=melodies, carry=Carry(data=True), steps=2),
        a_stage(net, data=melodies, carry=Carry(data=True), steps=3),
        a_stage(net, data=melodies, steps=3),
    ]
    recipe = Recipe(stages, net)
    seen = []
    for number, stage in enumerate(recipe.stages):
        units = open_units(stage, stage.data, None)
        source = MicroBatches.of(stage, units, seed=3, number=number)
        seen.append([unit for slot in slots(stage, 3, 0, stage.steps, 0, 1) for unit in source[slot].units])
    assert [stage.origin.data for stage in recipe.stages] == [0, 20, 36, 0]
    assert [stage.origin.order for stage in recipe.stages] == [None, 0, 0, None]
    assert sorted(seen[0] + seen[1] + seen[2]) == list(range(60))
    assert sorted(seen[3]) != sorted((seen[0] + seen[1])[:24])


def test_the_best_weights_are_of_the_stage_that_a_run_has_come_to(melodies, tmp_path):
    """Held-out losses of two stages are of other rows and tasks: those of the first are no better or worse."""

    def easy_then_hard(data: tuple[str, ...] = ()) -> Recipe:
        net = a_net()
        hard = a_task(net)
        easy = replace(hard, held_out=replace(hard.view, picks={"note": RandomTokens(role="tones", rate=0.01)}))
        more = dict(data=data, valid=data, valid_every=3)
        stages = [a_stage(net, easy, **more), a_stage(net, hard, **more, optimizer=AdamW(lr=1e-9, schedule=Constant()))]
        return Recipe(stages, net)

    run = mmpre.train(easy_then_hard, out=tmp_path / "run", options=OPTIONS, data=melodies)
    told = [line["valid_loss"] for line in read_metrics(run / "metrics.jsonl") if "valid" in line]
    best = of_run(run, best=True)
    assert best.state["best"]["step"] in (9, 12) and best.state["best"]["loss"] == min(told[2:])


def test_what_cannot_be_carried_over_is_refused(melodies):
    net = a_net()
    with pytest.raises(ValueError, match="first stage has no stage before it"):
        Recipe([a_stage(net, carry=ALL)], net)
    with pytest.raises(ValueError, match="cannot be carried between AdamW and LAMB"):
        other = a_stage(net, carry=Carry(optimizer=True), optimizer=LAMB(lr=1e-3, schedule=Constant()))
        Recipe([a_stage(net), other], net)
    with pytest.raises(ValueError, match=r"only where data is the same, got \('m.tar',\) and then \('n.tar',\)"):
        Recipe([a_stage(net), a_stage(net, carry=Carry(data=True), data=("n.tar",))], net)


def test_units_that_are_cut_otherwise_are_no_stream_to_go_on_in(melodies, tmp_path):
    from mmpre.modalities.text import Text, TextReader

    with webdataset.ShardWriter(str(tmp_path / "t-%03d.tar"), verbose=0) as sink:
        for i in range(20):
            sink.write({"__key__": f"{i:03d}", "txt": b"a text of some words that are more than one window"})

    def cut(data: tuple[str, ...] = ()) -> Recipe:
        stages = []
        for length in (16, 40):
            net = Network({"tones": Text(TextReader(max_length=length, windowed=True), width=16)}, nn.Identity())
            stages.append(a_stage(net, data=data, carry=Carry(data=bool(stages))))
        return Recipe(stages, net)

    with pytest.raises(RunError, match=r"stage 1 cannot carry on in the data of stage 0: .* units of 20 samples there"):
        mmpre.train(cut, out=tmp_path / "run", options=OPTIONS, data=(str(tmp_path),))


def test_an_average_follows_every_step_is_kept_and_is_no_ones_parameter(melodies, tmp_path):
    seen = []

    class Watched(Average):
        def update(self, step):
            super().update(step)
            seen.append((step, self._source[0].encoder.blocks[0].sublayers[0].norm.bias.detach().clone()))

    def watched(data: tuple[str, ...] = ()) -> Recipe:
        net = a_net()
        average = Watched(net, LinearRamp(first=0.5, last=0.9, steps=4))
        return Recipe([a_stage(net, data=data)], net, {"average": average})

    run = mmpre.train(watched, out=tmp_path / "run", options=OPTIONS, data=melodies)
    expected = torch.zeros(16)
    for step, bias in seen:
        decay = 0.5 + 0.1 * min(step, 4)
        expected = decay * expected + (1 - decay) * bias
    assert [step for step, _ in seen] == list(range(6))
    kept = of_run(run).tensors
    name = "average.module.encoder.blocks.0.sublayers.0.norm.bias"
    torch.testing.assert_close(kept["model"][name], expected)
    assert not any(label.startswith("average") for label in kept["optimizer"])


def test_an_average_has_no_dropout_and_no_gradient_and_is_not_trained():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    both = nn.ModuleDict({"net": net, "average": Average(net, 0.9)})
    both.train()
    x = torch.ones(3, 4, requires_grad=True)
    assert torch.equal(both["average"](x), both["average"](x)) and not both["average"](x).requires_grad
    assert {name for name, p in both.named_parameters() if p.requires_grad} == {"net.0.weight", "net.0.bias"}
    with torch.no_grad():
        net[0].weight.zero_()
    both["average"].restart()
    assert not both["average"].module[0].weight.any()
    with pytest.raises(ValueError, match=r"decay must lie between 0 and 1 .*got 1.5"):
        Average(net, 1.5)


def test_a_skipped_step_moves_no_average(melodies, tmp_path):
    with webdataset.ShardWriter(str(tmp_path / "bad-%03d.tar"), verbose=0) as sink:
        for i in range(8):
            sink.write({"__key__": f"m{i:02d}", "notes": b"1 inf 3 nan"})

    def bad(data: tuple[str, ...] = ()) -> Recipe:
        net = a_net()
        average = Average(net, 0.9)
        with torch.no_grad():
            net.encoder.blocks[0].sublayers[0].norm.bias.add_(1.0)
        return Recipe([a_stage(net, data=data, steps=2)], net, {"average": average})

    run = mmpre.train(bad, out=tmp_path / "run", options=OPTIONS, data=(str(tmp_path),))
    assert equal(
        {n.removeprefix("average.module"): t for n, t in weights(run, "average").items()},
        {n.removeprefix("network"): t for n, t in weights(run).items()},
    )


def test_a_stage_starts_from_a_part_of_the_run_or_of_another(melodies, tmp_path):
    run = run_of(tmp_path, melodies, start="network>teacher", frozen=True)
    middle = run_of(tmp_path, melodies, "half", split=12, start="network>teacher")  # one stage, which is never started
    assert not equal(weights(run, "teacher"), weights(middle, "teacher"))
    teacher, network = weights(run, "teacher"), weights(run)
    assert not any(torch.equal(t, network[n.replace("teacher", "network")]) for n, t in teacher.items() if t.any())
    half = two_of_them()
    fill = FromRun(run=str(run), source="teacher", into="network").fill(half.module())
    assert fill == f"network starts from teacher of {run}, step 12"
    assert all(torch.equal(t, teacher[f"teacher.{n}"]) for n, t in half.network.state_dict().items())


def test_what_is_not_there_to_start_from_is_named(melodies, tmp_path):
    with pytest.raises(ValueError, match=r"no part 'network.decoder': network has no 'decoder'; it has mod"):
        run_of(tmp_path, melodies, start="network.decoder>teacher")
    with pytest.raises(ValueError, match=r"Copied\(source='network', into='teacher.encoder'\): .* does not fit"):
        run_of(tmp_path, melodies, "other", start="network>teacher.encoder")


def test_a_started_stage_restarts_averages_and_another_does_not(melodies, tmp_path):
    plain = run_of(tmp_path, melodies, teach=True, carry="schedule")
    started = run_of(tmp_path, melodies, "started", teach=True, carry="schedule", start="network>teacher", frozen=True)
    assert equal(weights(plain), weights(started))
    assert not equal(weights(plain, "average"), weights(started, "average"))


@pytest.mark.parametrize(("first", "batch", "steps", "multiple"), [(4, 16, 10, 4), (8, 64, 7, 8), (32, 32, 5, 4),
                                                                    (1, 97, 13, 1), (256, 1024, 1000, 64)])  # fmt: skip
def test_a_ramped_batch_is_the_line_in_whole_micro_batches(first, batch, steps, multiple):
    ramp = BatchRamp(first=first, steps=steps)
    position = 0
    for step in range(steps + 5):
        start, size = ramp.at(step, batch, multiple)
        line = first + (batch - first) * min(step + 0.5, steps) / steps
        assert start == position and size % multiple == 0
        assert abs(size - (line if step < steps else batch)) < multiple and multiple <= size <= batch
        position += size


def test_a_ramp_that_the_micro_batches_do_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"multiples of micro_batches \(4\), got 6 and 16"):
        a_stage(a_net(), batch=16, micro_batches=4, ramp=BatchRamp(first=6, steps=3))
    with pytest.raises(ValueError, match="ramp must take at least 1 step, from at most 8 rows"):
        a_stage(a_net(), ramp=BatchRamp(first=16, steps=3))
