"""Masked prediction by one recipe for every modality, and two towers."""

import json
from typing import get_args

import pytest

import mmpre
from mmpre.data.shards import shard_writer
from mmpre.evaluation.evaluate import evaluate
from mmpre.modalities.code_graph import graph_attend
from mmpre.plugins import find_recipe
from mmpre.recipes.masked import Kind


@pytest.mark.parametrize("mask", ["tokens", "spans"])
@pytest.mark.parametrize("modality", get_args(Kind))
def test_every_modality_has_its_mask_and_its_head(modality, mask):
    found = find_recipe("masked")
    recipe = found.build(found.numbers("tiny", {"modality": modality, "mask": mask}))
    (task,) = recipe.stages[0].tasks
    (pick,) = task.view.picks.values()
    assert list(recipe.network.readers) == [modality] and pick.role == modality
    if mask == "spans":  # as many tokens are hidden, away from a row's start
        assert 1 - (1 - pick.chance) ** pick.length == pytest.approx(0.15)


@pytest.mark.parametrize("thing", ["image_patches", "video", "speech", "code"])
def test_two_towers_read_a_thing_and_its_text(thing):
    found = find_recipe("two_towers")
    recipe = found.build(found.numbers("tiny", {"thing": thing}))
    assert list(recipe.towers) == [thing, "text"] and recipe.network is recipe.towers[thing].net


def test_it_learns_which_strand_a_row_of_one_letter_is(tmp_path):
    letters = "A" * 2_000
    with shard_writer(tmp_path / "dna", prefix="dna") as sink:
        for i in range(4):
            sink.write({"__key__": f"{i}", "fa": f">s{i}\n{letters[i:]}\n"})
    run = mmpre.train("masked", scale="tiny", out=tmp_path / "run", data=(str(tmp_path / "dna"),), modality="dna",
                      length=64, width=32, depth=1, heads=2, batch=16, steps=40, warmup=4, lr=1e-2)  # fmt: skip
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    assert losses[-1] < 0.4 < 1.5 < losses[0]


PROGRAMS = [f"def {name}({a}, {b}):\n    {c} = {a} + {b}\n    return {c}\n" for name, a, b, c in (
    ("add", "x", "y", "z"), ("join", "left", "right", "both"), ("merge", "old", "new", "out"), ("sum", "p", "q", "r"),
)]  # fmt: skip


def test_code_is_read_with_its_graph_and_found_by_its_text(tmp_path):
    for split in ("train", "valid", "test"):
        with shard_writer(tmp_path / split, prefix=split) as sink:
            for i, code in enumerate(PROGRAMS):
                name = code.split("(")[0].removeprefix("def ")
                sink.write({"__key__": f"{i}", "py": code, "txt": f"{name} {code.split('return ')[1]}"})
    tasks = [{"kind": "retrieval", "about": "by its text", "input": "txt", "target": "py"}]
    (tmp_path / "card.json").write_text(json.dumps({"name": "code", "tasks": tasks}))
    run = mmpre.train("masked", scale="tiny", out=tmp_path / "run", data=(f"{tmp_path}/train",), modality="code_graph",
                      valid=(f"{tmp_path}/valid",), length=128, width=32, depth=2, heads=2, batch=4, steps=30,
                      warmup=3, lr=5e-3)  # fmt: skip
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    (task,) = mmpre.load(run).recipe.stages[0].tasks
    assert task.view.attend == task.objective.net.attend == graph_attend("code_graph")
    found = {one["name"]: one["value"] for one in evaluate(run)["trained"]["results"]}
    assert {"code: by its text: py to txt R@1", "code: by its text: txt to py R@1"} <= set(found)
    assert all(0 <= value <= 1 for name, value in found.items() if "R@" in name)


def test_a_member_that_no_language_has_is_told():
    with pytest.raises(ValueError, match="masked: member must be one of py, java, js, got 'python'"):
        find_recipe("masked").build(
            find_recipe("masked").numbers("tiny", {"modality": "code_graph", "member": "python"})
        )
