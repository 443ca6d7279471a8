"""Does the suite of `mmpre eval` find what is known to be there, and say so when it cannot look?"""

import io
import itertools
import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import mmpre
from mmpre.command_line.cli import main
from mmpre.data.sample import Sample
from mmpre.data.shards import shard_writer
from mmpre.encoder import llama_encoder
from mmpre.evaluation.cards import CardError, card_beside
from mmpre.evaluation.collapse import collapse, rank_me, spread
from mmpre.evaluation.evaluate import evaluate, kept
from mmpre.evaluation.features import pooled
from mmpre.evaluation.page import markdown
from mmpre.evaluation.probe import Known, classify, regress
from mmpre.evaluation.results import NotMeasured, Result, gain, mean, statistic
from mmpre.evaluation.search import Found, chance_of_mrr, first_right, search
from mmpre.evaluation.suite import card_tasks
from mmpre.modalities.dna import Dna, DnaReader
from mmpre.network import Network
from mmpre.runs.checkpoint import CheckpointError
from mmpre.runs.options import RunOptions
from mmpre.runs.run import RunError, load, resume

RNG = np.random.default_rng(0)


def known(count, *, shuffled=False, classes=4, width=8):
    """Vectors of which layer 1 holds the label and layer 0 nothing."""
    y_S = np.arange(count) % classes
    noise_SD = RNG.normal(size=(count, width))
    label_SD = noise_SD * 0.1 + np.eye(width)[y_S]
    return Known([noise_SD, label_SD], RNG.permutation(y_S).astype(str) if shuffled else y_S.astype(str))


def test_a_probe_reads_what_the_vectors_hold_from_the_layer_that_holds_it():
    results = classify("known", known(400), known(200), known(300))
    assert [one.value for one in results] == [1.0, 1.0, 1.0]
    assert {one.protocol["layer"] for one in results} == {1}
    assert [one.name.split(": ")[1] for one in results] == ["linear probe", "20 neighbours", "10 of a class"]


def test_shuffled_labels_give_chance():
    results = classify("shuffled", known(400, shuffled=True), known(200, shuffled=True), known(800, shuffled=True))
    for one in results:
        assert one.value == pytest.approx(0.25, abs=0.06) and one.chance == pytest.approx(0.25, abs=0.05)


def test_choices_are_made_on_valid_alone():
    """Where valid has its labels in another layer than the test, valid is believed."""
    train = Known([np.eye(4)[np.arange(200) % 4], np.eye(4)[np.arange(200) % 4]], np.arange(200) % 4)
    noise, y = RNG.normal(size=(100, 4)), np.arange(100) % 4
    (linear, *_) = classify("misled", train, Known([np.eye(4)[y], noise], y), Known([noise, np.eye(4)[y]], y))
    assert linear.protocol["layer"] == 0 and linear.value < 0.6


def test_regression_finds_a_line_and_averages_groups():
    def line(count):
        x_SD = RNG.normal(size=(count, 3))
        return Known([x_SD * 0, x_SD], 10 + x_SD @ np.array([1.0, 2.0, 3.0]), np.arange(count) // 5)

    error, rank = regress("line", line(300), line(100), line(100))
    assert error.n == 20 and error.value < 0.05 < error.chance and error.less
    assert rank.value > 0.99 and error.protocol["layer"] == 1


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    inside = 0
    for i in range(200):
        one = mean(f"coin {i}", np.random.default_rng(i).random(60) < 0.3, resamples=200)
        inside += one.low <= 0.3 <= one.high
    assert 0.88 <= inside / 200 <= 0.99
    wide = statistic("median", np.median, np.arange(101.0))
    assert wide.value == 50 and wide.low < 45 and wide.high > 55


def test_a_gain_is_taken_row_by_row_in_the_direction_that_is_better():
    before, after = np.array([5.0, 7.0, 9.0]), np.array([4.0, 6.0, 8.0])
    assert gain(mean("x", after, less=True), mean("x", before, less=True)) == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert gain(mean("x", after), mean("x", before[:2])) is None


def test_search_ranks_the_best_right_item():
    unit_PD = np.eye(6)
    found = first_right(unit_PD, unit_PD, [*"aabbcd"], [*"aabbcd"])
    assert found.rank_Q.tolist() == [0] * 6 and found.right_Q.tolist() == [2, 2, 2, 2, 1, 1]
    found = first_right(unit_PD, unit_PD, [*"aabbcd"], [*"aabbcd"], alike=True)  # all others are equally far
    assert found.rank_Q.tolist() == [2.0] * 4  # c and d have no other
    turned = np.roll(unit_PD, 1, 0)
    r1, r5, mrr, median = search("turned", unit_PD, turned, range(6), range(6))
    assert (r1.value, r1.chance) == (0.0, pytest.approx(1 / 6)) and r5.chance == pytest.approx(5 / 6)
    assert median.value == 4 and median.chance == 3.5
    assert mrr.value == pytest.approx(1 / 4) and mrr.chance == pytest.approx(sum(1 / k for k in range(1, 7)) / 6)
    orders = [min(order.index(i) for i in (0, 1)) for order in itertools.permutations(range(5))]
    assert chance_of_mrr(5, 2) == pytest.approx(np.mean([1 / (one + 1) for one in orders]))


def test_a_tie_is_found_as_often_as_any_order_of_it_would_find_it():
    for wrong_above, wrong_tied, right_tied in itertools.product(range(3), range(4), range(1, 4)):
        score_1P = np.array([[2.0] * wrong_above + [1.0] * (wrong_tied + right_tied) + [0.0] * 2])
        right_1P = np.array([[False] * (wrong_above + wrong_tied) + [True] * right_tied + [False, True]])
        found = Found.by(score_1P, right_1P)
        for k in (1, 2, 3, 5):
            hits = [
                any(order[: max(0, k - wrong_above)])
                for order in itertools.permutations([False] * wrong_tied + [True] * right_tied)
            ]
            assert found.within(k) == pytest.approx([np.mean(hits)])
    constant_PP = np.zeros((20, 20))
    assert Found.by(constant_PP, np.eye(20, dtype=bool)).within(10) == pytest.approx(np.full(20, 0.5))  # as chance


def test_nothing_to_search_is_told():
    with pytest.raises(NotMeasured, match="there are 0 queries and 3 items; look at the task's members"):
        search("empty", np.zeros((0, 4)), np.zeros((3, 4)), [], [1, 2, 3])
    with pytest.raises(NotMeasured, match="none of 2 queries has a right item"):
        search("strange", np.zeros((2, 4)), np.zeros((3, 4)), [8, 9], [1, 2, 3])


def test_collapse_is_told_from_spread():
    noise, one = RNG.normal(size=(500, 16)), np.outer(RNG.normal(size=500), np.ones(16))
    assert rank_me(noise) > 15 and rank_me(one) < 1.01
    assert spread(noise) > 0.98 and spread(np.ones((5, 4))) == pytest.approx(0)
    rank, _, variance = collapse("noise", noise * 2)
    assert (rank.name, variance.name) == ("noise: RankMe", "noise: variance")
    assert variance.low < 4 < variance.high and variance.value == pytest.approx(4, abs=0.3)
    assert collapse("one", np.ones((5, 4)))[2].value == 0
    assert collapse("alone", np.ones((1, 4))) == []


TASKS = [
    {"kind": "classification", "about": "brightness", "input": "png", "target": "cls"},
    {"kind": "regression", "about": "how bright", "input": "png", "target": "json:grey"},
    {"kind": "retrieval", "about": "as bright", "input": "png", "target": "png", "group": "json:grey"},
    {"kind": "retrieval", "about": "by name", "input": "png", "target": "txt"},
    {"kind": "classification", "about": "of another set", "input": "png", "target": "cls", "train": "../gone/train"},
    {"kind": "detection", "about": "found", "input": "png", "target": "json"},
]


def write_set(folder, tasks=TASKS):
    for split, count in (("train", 60), ("valid", 30), ("test", 30)):
        with shard_writer(folder / split, prefix=split) as sink:
            for i in range(count):
                grey, file = i % 3 * 100, io.BytesIO()
                noise_HW3 = np.random.default_rng(i).integers(0, 40, (16, 16, 3))
                Image.fromarray((noise_HW3 + grey).astype(np.uint8)).save(file, "PNG")
                sink.write({"__key__": f"{i:03d}", "png": file.getvalue(), "cls": str(i % 3), "txt": f"{i % 3} grey",
                            "json": json.dumps({"grey": grey})})  # fmt: skip
    (folder / "card.json").write_text(json.dumps({"name": "grey", "tasks": tasks}))
    return folder


TINY = dict(modality="image_patches", patch_px=8, width=16, depth=2, heads=2, batch=8, warmup=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    write_set(folder / "grey")
    numbers = dict(TINY, data=(f"{folder}/grey/train",), valid=(f"{folder}/grey/valid",))
    return mmpre.train("masked", scale="tiny", out=folder / "run", steps=4, **numbers)


def same(answer):
    return {name: answer[name] for name in ("trained", "untrained", "trivial", "gain", "not measured", "step")}


def test_a_run_is_measured_by_the_card_of_its_data_and_keeps_what_was_found(run, capsys):
    answer = evaluate(run)
    found = {one["name"]: one for one in answer["trained"]["results"]}
    for name in ("brightness: linear probe", "brightness: 20 neighbours", "as bright: png to png R@1"):
        assert found[f"grey: {name}"]["value"] == 1.0
    assert found["grey: how bright: mean error"]["value"] < 10
    assert found["grey png: RankMe"]["value"] > 1
    bags = {one["name"]: one for one in answer["trivial"]["results"]}
    assert bags["grey: brightness: linear probe"]["value"] == 1.0
    assert answer["not measured"] == {
        "grey: by name": "the run has no towers that put .png and .txt in one space; name them by Recipe.towers",
        "grey: of another set": f"no ../gone/train beside {run.parent}/grey/card.json; build that data set there",
        "grey: found": "tasks of kind detection are not measured here; fine-tune an exported network for them",
    }
    assert set(answer["gain"]) >= {"grey: brightness: linear probe", "grey: how bright: mean error"}
    assert evaluate(run)["trained"] == answer["trained"] and len(kept(run)) == 1  # in place of the first
    main(["eval", str(run), "--table"])
    printed = capsys.readouterr().out.strip()
    assert printed.endswith(markdown(kept(run))) and "mmpre train masked --scale tiny" in printed
    assert "seed 0" in printed and re.search(r"4 steps in (\d+ seconds|\d+\.\d minutes), held-out", printed)
    assert "| grey: brightness: linear probe | 30 | 1.000 (1.000 to 1.000) |" in markdown(kept(run))


def test_runs_that_differ_by_their_seed_are_told_together(run, tmp_path, capsys):
    numbers = {name: one for name, one in load(run).record["numbers"].items() if name in (*TINY, "data", "valid")}
    runs = [
        mmpre.train("masked", scale="tiny", out=tmp_path / f"{seed}", steps=4, options=RunOptions(seed=seed), **numbers)
        for seed in (0, 1)
    ]
    both = [evaluate(one, kinds=["classification"]) for one in runs]
    evaluate(runs[1], untrained=False, bags=False, data=load(run).record["numbers"]["valid"])  # counts once
    evaluate(runs[1], kinds=["classification"])
    main(["eval", *map(str, runs), "--table"])
    printed = capsys.readouterr().out
    assert printed.count("mmpre train") == 1 and "seeds 0, 1, commit" in printed and " each, held-out" in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("| masked: loss |")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    trained, untrained = (np.array([one[which]["tasks"]["masked"]["loss"] for one in both]) for which in
                          ("trained", "untrained"))  # fmt: skip
    assert cells[2] == f"{trained.mean():.3f} ± {trained.std(ddof=1):.3f}"
    assert cells[3] == f"{untrained.mean():.3f} ± {untrained.std(ddof=1):.3f}"
    middle, low, high = (float(one) for one in re.findall(r"-?\d+\.\d+", cells[4]))
    better = untrained - trained  # a loss: lower is better
    assert middle == pytest.approx(better.mean(), abs=1e-3)
    reach = 12.706 * better.std(ddof=1) / 2**0.5  # Student's t of one degree of freedom
    assert (low, high) == pytest.approx((middle - reach, middle + reach), abs=2e-3)
    assert "| grey: brightness: linear probe | 30 | 1.000 ± 0.000 | 1.000 ± 0.000 |" in printed


def test_what_is_no_number_is_told_and_what_was_kept_before_it_stays_readable(run, monkeypatch):
    def strange(task, subject):
        return [Result("a number", 1.0, 1.0, 1.0, 3), Result("none", float("nan"), 0.0, 1.0, 3)]

    def no_number(*arguments, **named):
        return {"masked": {"loss": float("nan"), "masked": 2.0}}

    monkeypatch.setattr("mmpre.evaluation.evaluate.measure", strange)
    monkeypatch.setattr("mmpre.evaluation.evaluate.held_out", no_number)
    answer = evaluate(run, kinds=["classification"], bags=False)
    assert {one["name"] for one in answer["trained"]["results"]} >= {"a number"}
    assert answer["trained"]["tasks"] == {"masked": {"masked": 2.0}}
    assert answer["not measured"]["none"] == "its value is nan (0.0 to 1.0) over 3"
    assert answer["not measured"]["masked: loss"] == "its value is nan"
    assert kept(run)[-1]["not measured"] == answer["not measured"]
    main(["eval", str(run), "--table"])  # which shows what there is
    (run / "evaluation.json").write_text("[NaN]")
    assert evaluate(run, kinds=["classification"], bags=False)["step"] == kept(run)[-1]["step"] and len(kept(run)) == 1


def test_a_member_of_several_kinds_is_searched_by(run, tmp_path):
    shutil.copytree(run.parent / "grey", tmp_path / "grey")
    about = {"kind": "retrieval", "about": "like", "input": "png|jpg", "target": "png|jpg"}
    (tmp_path / "grey/card.json").write_text(json.dumps({"name": "grey", "tasks": [about]}))
    answer = evaluate(run, sets=[tmp_path / "grey"], untrained=False, bags=False)
    # pictures are all different, so that nothing is like another
    assert "has a right item" in answer["not measured"]["grey: like"]


def test_texts_in_json_are_found_as_a_text_member_is(tmp_path):
    words = [f"{one} {two}" for one in "red blue green grey".split() for two in "fox owl elk cat ant".split()]
    tasks = [
        {"kind": "retrieval", "about": "by words", "input": "txt", "target": "json:words", "group": "json:words"},
        {"kind": "retrieval", "about": "by a number", "input": "txt", "target": "json:number", "group": "json:words"},
        {"kind": "classification", "about": "its words", "input": "json:words", "target": "json:number"},
    ]
    for split in ("train", "valid", "test"):
        with shard_writer(tmp_path / "set" / split, prefix=split) as sink:
            for i, one in enumerate(words):
                told = {"words": one.split(), "number": i} if i else ["no mapping"]
                sink.write({"__key__": f"{i:02d}", "txt": ", ".join(one.split()), "json": json.dumps(told)})
    (tmp_path / "set/card.json").write_text(json.dumps({"name": "words", "tasks": tasks}))
    shards = {which: (f"{tmp_path}/set/{which}",) for which in ("train", "valid")}
    small = dict(modality="text", width=16, depth=1, heads=2, batch=8, warmup=1)
    run = mmpre.train("masked", scale="tiny", out=tmp_path / "run", steps=2, data=shards["train"],
                      valid=shards["valid"], **small)  # fmt: skip
    answer = evaluate(run, untrained=False)
    found = {one["name"]: one for one in answer["trained"]["results"]}
    for way in ("json:words to txt", "txt to json:words"):  # the same text, read the same way
        assert found[f"words: by words: {way} R@1"]["value"] == 1.0
        assert found[f"words: by words: {way} R@1"]["n"] == len(words) - 1
    assert answer["not measured"]["words: by a number"] == "no sample of train has a text, or several, called number"
    assert answer["not measured"]["words: its words"].startswith("the run reads no .json:words")


def test_the_untrained_network_is_the_one_that_the_seed_draws(run):
    answer, opened = evaluate(run), load(run)
    before = opened.untrained().module().state_dict()
    first = mmpre.train(
        "masked", scale="tiny", out=run.parent / "again", steps=2, options=RunOptions(seed=0),
        **{name: value for name, value in opened.record["numbers"].items() if name in (*TINY, "data", "valid")},
    )  # fmt: skip
    drawn = load(first).untrained().module().state_dict()
    assert before.keys() == drawn.keys() and all(torch.equal(before[name], drawn[name]) for name in before)
    assert any(not torch.equal(t, before[name]) for name, t in opened.recipe.module().state_dict().items())
    assert answer["untrained"] == evaluate(first)["untrained"]


def test_a_resumed_run_is_measured_alike(run, tmp_path):
    numbers = load(run).record["numbers"]
    options = RunOptions(save_every=2, threads=1)

    whole = mmpre.train("masked", out=tmp_path / "whole", options=options, **numbers)
    broken = mmpre.train("masked", out=tmp_path / "broken", options=options, **numbers)
    shutil.rmtree(broken / "checkpoints" / "step-00000004")
    resume(broken)
    assert same(evaluate(broken)) == same(evaluate(whole))


def test_a_card_that_cannot_be_used_and_a_run_without_checkpoint_are_told(run, tmp_path):
    folder = write_set(tmp_path / "wrong", [{"kind": "clasification", "about": "", "input": "png", "target": "cls"}])
    with pytest.raises(CardError, match=r"task 0 is of kind 'clasification'; wanted one of .* Is it classification\?"):
        evaluate(run, sets=[folder])
    (folder / "card.json").write_text(json.dumps({"name": "x", "tasks": [TASKS[0] | {"colour": 1}]}))
    with pytest.raises(CardError, match=r"task 0 has colour; known: .*'about'"):
        card_tasks(folder)
    (folder / "card.json").write_text("[]")
    with pytest.raises(CardError, match=r"is no card .* build the data set again, or mend it"):
        card_tasks(folder)
    (folder / "card.json").write_text('{"counts": {"train": 60}}')  # what was packed, not built
    assert card_tasks(folder) == []
    with pytest.raises(RunError, match=r"no task on the cards of .*wrong; add some, or name other sets"):
        evaluate(run, sets=[folder])
    assert card_beside((str(run.parent / "grey" / "train"),)) == run.parent / "grey"
    empty = shutil.copytree(run, tmp_path / "empty")
    shutil.rmtree(empty / "checkpoints")
    with pytest.raises(CheckpointError, match="holds no valid checkpoint"):
        evaluate(empty)


def test_towers_are_searched_in_both_ways_and_name_classes(tmp_path):
    write_set(tmp_path / "grey", TASKS[:1] + TASKS[3:4])
    data = (str(tmp_path / "grey" / "train"),)
    run = mmpre.train("two_towers", scale="tiny", out=tmp_path / "run", data=data, patch_px=8, side_px=16, width=16,
                      depth=1, heads=2, shared=8, batch=12, steps=40, warmup=4, lr=1e-2)  # fmt: skip
    found = {one["name"]: one for one in evaluate(run)["trained"]["results"]}
    assert found["grey: by name: txt to png R@1"]["n"] == 3  # equal texts are one query
    assert found["grey: by name: png to txt R@1"]["n"] == 30
    assert found["grey: by name: png to txt R@1"]["value"] > 0.6 > found["grey: by name: png to txt R@1"]["chance"]
    assert found["grey: brightness: zero-shot"]["chance"] == pytest.approx(1 / 3)


def test_means_by_place_are_those_of_each_place_alone():
    """Side by side: the mean state of the tokens at places 0, 3, 6 ... of their row, of 1, 4, 7 ... and so on."""
    torch.manual_seed(0)
    reader = DnaReader(length=10, ends=False)
    network = Network({"dna": Dna(reader, width=4)}, llama_encoder(4, 1, 2))
    texts = ["ACGTTGCAAC" + "GGATTC", "TTGAC", "A"]  # the first one is two windows
    samples = [(i, Sample(f"{i}", "", f"{i}", {"fa": f">a\n{text}\n".encode()})) for i, text in enumerate(texts)]
    by_place = pooled(network, "fa", samples, period=3)
    assert by_place.x_LSD.shape == (2, 3, 12)
    table = network.modalities["dna"].table.weight.detach().numpy()
    for row, text in enumerate(texts):
        windows = [text[i : i + 10] for i in range(0, len(text), 10)]
        for place in range(3):
            letters = [letter for window in windows for letter in window[place::3]]
            wanted = np.mean([table["ACGT".index(letter)] for letter in letters], 0) if letters else np.zeros(4)
            np.testing.assert_allclose(by_place.x_LSD[0, row, 4 * place : 4 * place + 4], wanted, atol=1e-6)
    whole = pooled(network, "fa", samples)
    for row, text in enumerate(texts):
        windows = [text[i : i + 10] for i in range(0, len(text), 10)]
        counts = np.array([sum(len(window[place::3]) for window in windows) for place in range(3)])
        together = (by_place.x_LSD[:, row].reshape(2, 3, 4) * counts[:, None]).sum(1) / counts.sum()
        np.testing.assert_allclose(whole.x_LSD[:, row], together, atol=1e-5)


def test_an_evaluation_that_cannot_be_kept_is_told_and_given(run, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mmpre.evaluation.evaluate.keep", full)
    assert evaluate(run, kinds=["classification"], untrained=False, bags=False)["trained"]["results"]
    assert "the evaluation cannot be kept" in caplog.text and "No space left" in caplog.text
