"""Do the kinds of task that need more than a probe find what is known to be there, and say so when they cannot?"""

import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import mmpre
from mmpre.data.sample import Sample
from mmpre.data.shards import shard_writer
from mmpre.draw import Draw
from mmpre.evaluation import fine_tuning
from mmpre.evaluation.cards import CardError
from mmpre.evaluation.evaluate import evaluate
from mmpre.evaluation.few_shot import DRAWS, SHOTS, few_shot
from mmpre.evaluation.fine_tuning import examples
from mmpre.evaluation.minimal_pairs import _hidden
from mmpre.evaluation.probe import Known
from mmpre.evaluation.subject import Subject
from mmpre.evaluation.suite import card_tasks
from mmpre.evaluation.transcription import _decoded, _edits, _needed
from mmpre.modalities.text import TextReader

RNG = np.random.default_rng(0)


def known(count, *, shuffled=False, classes=4, width=8):
    """Vectors of which layer 1 holds the label and layer 0 nothing."""
    y_S = np.arange(count) % classes
    noise_SD = RNG.normal(size=(count, width))
    label_SD = noise_SD * 0.1 + np.eye(width)[y_S]
    return Known([noise_SD, label_SD], RNG.permutation(y_S).astype(str) if shuffled else y_S.astype(str))


def write_set(folder, tasks, sample, counts=(("train", 60), ("valid", 30), ("test", 30)), **card):
    for split, count in counts:
        with shard_writer(folder / split, prefix=split) as sink:
            for i in range(count):
                sink.write({"__key__": f"{i:03d}"} | sample(i))
    (folder / "card.json").write_text(json.dumps({"name": "made", "tasks": tasks} | card))
    return folder


def grey_picture(i):
    """A noisy square of one of three greys, its class and its name."""
    file, noise_HW3 = io.BytesIO(), np.random.default_rng(i).integers(0, 40, (16, 16, 3))
    Image.fromarray((noise_HW3 + i % 3 * 100).astype(np.uint8)).save(file, "PNG")
    return {"png": file.getvalue(), "cls": str(i % 3), "txt": f"{['dark', 'grey', 'light'][i % 3]} one"}


def results(answer, who="trained"):
    return {one["name"].removeprefix("made: "): one for one in answer[who]["results"]}


PICTURES = dict(scale="tiny", modality="image_patches", patch_px=8, width=16, depth=2, heads=2, batch=8, warmup=1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A set of greys and a run on it that sees pictures alone."""
    folder = tmp_path_factory.mktemp("pictures")
    write_set(folder / "made", [], grey_picture)
    data = (f"{folder}/made/train",)
    return folder / "made", mmpre.train("masked", out=folder / "run", steps=2, data=data, **PICTURES)


def with_tasks(folder, *tasks, **card):
    (folder / "card.json").write_text(json.dumps({"name": "made", "tasks": tasks} | card))
    return folder


def test_few_labels_suffice_where_the_vectors_hold_them_and_tell_nothing_where_they_do_not(recwarn):
    few = few_shot("known", known(200), known(100), known(200))
    assert not [one for one in recwarn.list if "unique classes" in str(one.message)]
    assert [one.name for one in few] == [f"known: {shots}-shot" for shots in SHOTS]
    assert few[-1].value == 1.0
    assert all(one.value > 0.8 and one.protocol["layer"] == 1 and one.protocol["draws"] == DRAWS for one in few)
    for one in few_shot("shuffled", known(200, shuffled=True), known(100, shuffled=True), known(400, shuffled=True)):
        assert one.value == pytest.approx(0.25, abs=0.06) and one.low < 0.25 < one.high


def test_the_interval_of_few_shots_is_over_draws_too():
    """Where each draw is all right or all wrong on every row, rows alone would give no interval."""
    x_SD = np.concatenate([np.full((20, 1), 1.0), np.full((20, 1), -1.0)])
    y_S = np.array(["a"] * 19 + ["b"] + ["b"] * 19 + ["a"])  # one of 20 is labelled wrong
    one_shot = few_shot("draws", *[Known([x_SD], y_S)] * 2, Known([x_SD[:20]], y_S[:20]))[0]
    assert one_shot.low < one_shot.value < one_shot.high


def test_a_run_is_measured_with_few_labels_beside_bags(pictures):
    folder, run = pictures
    task = {"kind": "few-shot", "about": "brightness", "input": "png", "target": "cls"}
    answer = evaluate(run, sets=[with_tasks(folder, task)])
    for who in ("trained", "untrained", "trivial"):
        assert results(answer, who)["brightness: 5-shot"]["value"] > 0.9
    assert results(answer)["brightness: 1-shot"]["protocol"]["least of a class"] == 1
    assert "made: brightness: 5-shot" in answer["gain"]


ZERO = {"kind": "zero-shot", "about": "brightness", "input": "png", "target": "cls", "prompts": ["{} one", "a {}"]}


def test_classes_are_named_by_prompts_in_the_space_of_towers(tmp_path):
    names = ["dark", "grey", "light"]
    folder = write_set(tmp_path / "made", [ZERO], grey_picture, (("train", 60), ("test", 30)), classes=names)
    towers = dict(patch_px=8, side_px=16, width=16, depth=1, heads=2, shared=8, batch=12, steps=40, warmup=4, lr=1e-2)
    run = mmpre.train("two_towers", scale="tiny", out=tmp_path / "run", data=(f"{folder}/train",), **towers)
    (folder / "train").rename(folder / "gone")  # nothing is fitted
    answer = evaluate(run, sets=[folder])
    found = results(answer)["brightness: zero-shot"]
    assert found["value"] > 0.6 and found["chance"] == pytest.approx(1 / 3)
    assert found["protocol"] == {"classes": 3, "prompts": ["{} one", "a {}"]}
    assert "brightness: zero-shot" in results(answer, "untrained")


def test_a_run_without_towers_names_no_classes(pictures):
    folder, run = pictures
    told = evaluate(run, sets=[with_tasks(folder, ZERO)])["not measured"]["made: brightness"]
    assert told == (
        "zero-shot: wanted towers for .png and .txt, got none for .png and .txt (the run has no towers); measure a run "
        "of a contrastive recipe, or probe this one"
    )


WORDS = ["mill", "toad", "bright", "quiz", "jump"]
SIMILAR = {"kind": "similarity", "about": "words", "input": "json:one", "other": "json:two", "target": "json:score"}


def word_pair(i):
    """Two texts of five words, of which some are shared; their share is the score."""
    shared, rng = i % 6, np.random.default_rng(i)
    one = [WORDS[n] for n in rng.permutation(5)]
    two = one[:shared] + ["xxxxx"] * (5 - shared)
    return {"txt": " ".join(one), "json": json.dumps({"one": " ".join(one), "two": " ".join(two), "score": shared})}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A set of pairs of texts and a run on the first of them."""
    folder = tmp_path_factory.mktemp("texts")
    write_set(folder / "made", [], word_pair, (("train", 40), ("valid", 48), ("test", 60)))
    data = (f"{folder}/made/train",)
    run = mmpre.train("masked", scale="tiny", out=folder / "run", steps=2, data=data, width=16, depth=2, heads=2,
                      batch=8, warmup=1)  # fmt: skip
    return folder / "made", run


def test_vectors_of_texts_lie_as_near_as_their_scores_say(texts):
    folder, run = texts
    answer = evaluate(run, sets=[with_tasks(folder, SIMILAR)])
    for who in ("trained", "untrained", "trivial"):
        found = results(answer, who)["words: Spearman"]
        assert found["value"] > 0.8 and found["low"] > 0.6 and found["n"] == 60 and found["chance"] == 0
    assert results(answer)["words: Spearman"]["protocol"]["valid rows"] == 48


def test_scores_that_mean_nothing_are_told_as_that(texts, tmp_path):
    def shuffled(i):
        return {"json": json.dumps(json.loads(word_pair(i)["json"]) | {"score": i * 7919 % 101})}

    folder = write_set(tmp_path / "made", [SIMILAR], shuffled, (("valid", 60), ("test", 150)))
    found = results(evaluate(texts[1], sets=[folder]))["words: Spearman"]
    assert found["low"] < 0 < found["high"]


def test_a_score_that_is_no_number_and_epochs_that_are_none_are_told(texts):
    task = SIMILAR | {"target": "json:one"}
    told = evaluate(texts[1], sets=[with_tasks(texts[0], task)], untrained=False)["not measured"]["made: words"]
    assert told.startswith("similarity: wanted a number as json:one of sample 000, got '")
    assert told.endswith("; look at the task's target")
    with pytest.raises(CardError, match="task 0 has epochs 0; wanted a whole number above 0"):
        card_tasks(with_tasks(texts[0], SIMILAR | {"epochs": 0}))


def test_pairs_that_a_run_cannot_read_or_a_card_does_not_name_are_told(pictures, texts):
    told = evaluate(pictures[1], sets=[with_tasks(texts[0], SIMILAR)])["not measured"]["made: words"]
    assert told.startswith("similarity: wanted a reader of .txt, the run reads .jpg, ") and told.endswith(
        "another task"
    )
    one_sided = {name: value for name, value in SIMILAR.items() if name != "other"}
    told = evaluate(texts[1], sets=[with_tasks(texts[0], one_sided)])["not measured"]["made: words"]
    assert told == 'similarity: wanted "other", the second side of a pair, beside "input"; add it to the card'


PAIRS = {"kind": "minimal pairs", "about": "order", "input": "txt", "other": "json:wrong", "target": "txt"}


def sentence_pair(i):
    """Letters in the order of the alphabet, and the same letters turned round."""
    start = np.random.default_rng(i).integers(0, 18)
    right = " ".join("abcdefghijklmnopqrstuvwxyz"[start : start + 8])
    return {"txt": right, "json": json.dumps({"wrong": right[::-1]})}


@pytest.mark.parametrize(
    ("recipe", "numbers"),
    [
        ("bert", dict(hide=0.3, lr=5e-3)),
        # whose words are predicted from the place before
        ("babylm2", dict(hidden=48, length=32, cooldown=5, masked=3, lr=2e-2, first_hide=0.3, last_hide=0.3)),
    ],
)
def test_a_sentence_like_those_that_were_seen_is_likelier_than_a_wrong_one(recipe, numbers, tmp_path):
    folder = write_set(tmp_path / "made", [PAIRS], sentence_pair, (("train", 200), ("test", 40)))
    numbers = dict(width=32, depth=2, heads=2, batch=32, steps=100, warmup=10, dropout=0.0) | numbers
    run = mmpre.train(recipe, scale="tiny", out=tmp_path / "run", data=(f"{folder}/train",), **numbers)
    answer = evaluate(run, sets=[folder])
    found = {who: results(answer, who)["order: right above wrong"] for who in ("trained", "untrained", "trivial")}
    assert found["trained"]["value"] > 0.9 and found["trained"]["n"] == 40
    assert found["untrained"]["value"] < 0.75
    assert found["trivial"]["value"] == 0.5  # the same letters
    assert found["trained"]["protocol"]["tokens"] > 40 * 2 * 8
    assert answer["gain"]["made: order: right above wrong"]["low"] > 0


def test_only_the_wanted_kinds_of_tasks_are_measured(texts):
    folder, run = texts[0], texts[1]
    wanted = with_tasks(folder, PAIRS, {"kind": "classification", "about": "parity", "input": "txt", "target": "cls"})
    answer = evaluate(run, sets=[wanted], untrained=False, kinds=["minimal pairs"])
    assert not any("parity" in name for name in [*results(answer), *answer.get("not measured", {})])
    with pytest.raises(ValueError, match="no task of kind retrieval on the cards of"):
        evaluate(run, sets=[wanted], kinds=["retrieval"])


def test_hidden_tokens_take_the_rest_of_their_word_with_them():
    reader = TextReader("bytes")
    tokens = reader.tokenize(Sample("k", "", "", {"txt": b"ab cd"}), Draw.row(0, 0, 0, epoch=0, unit=0))
    rows = list(_hidden("text", tokens))
    assert len(rows) == int((tokens.special_N < 0).sum())
    word_N = tokens["word"]
    for row in rows:
        first = int(row.picked["hidden"].clean_M)
        shown_N = ~row.replaced["text"]
        assert not shown_N[first] and shown_N[:first].all()
        assert (word_N[row.replaced["text"]] == word_N[first]).all()
        assert shown_N[word_N != word_N[first]].all()


def test_a_run_without_a_vocabulary_head_says_no_sentences(pictures, texts):
    told = evaluate(pictures[1], sets=[with_tasks(texts[0], PAIRS)])["not measured"]["made: order"]
    assert told == (
        "minimal pairs: wanted a task with a vocabulary head for .txt, the run has Pixels for image_patches; measure a "
        "run of masked prediction of text, such as bert"
    )


TUNED = {"kind": "fine-tuning", "about": "brightness", "input": "png", "target": "cls", "epochs": 15}


def test_a_whole_network_learns_a_class_from_labels_and_the_run_stays_as_it_is(pictures):
    folder, run = pictures
    other = {"kind": "classification", "about": "probed", "input": "png", "target": "cls"}
    alone = results(evaluate(run, sets=[with_tasks(folder, other)]))
    answer = evaluate(run, sets=[with_tasks(folder, TUNED, other)])
    for who in ("trained", "untrained", "trivial"):
        assert results(answer, who)["brightness: fine-tuned"]["value"] > 0.9
    told = results(answer)["brightness: fine-tuned"]["protocol"]
    assert told["epochs"] == 15 and told["seed"] == 0 and told["lr"] in told["of"] and told["train windows"] == 60
    assert results(answer)["probed: linear probe"] == alone["probed: linear probe"]


def test_fine_tuning_leaves_alone_what_no_stage_trains(pictures):
    subject = Subject(mmpre.load(pictures[1]).recipe)
    front = dict(subject.network.named_parameters())
    still = {name for name in front if not name.startswith("encoder")}
    for name in still:
        front[name].requires_grad_(False)
    task = card_tasks(with_tasks(pictures[0], TUNED | {"epochs": 1}))[0]
    parts = {
        part: examples(task, subject, part, lambda sample, windows, value: [torch.tensor([int(value)])] * len(windows))
        for part in ("train", "valid")
    }
    tuned, _ = fine_tuning.train(task, subject, parts, len, outputs=3, pool=True, loss=F.cross_entropy)
    after = dict(tuned.net.named_parameters())
    assert still and {name for name, value in front.items() if torch.equal(value, after[name])} == still


def test_bags_beside_a_trained_network_have_its_samples_alone(pictures, monkeypatch):
    monkeypatch.setattr("mmpre.evaluation.suite.MOST", {"train": 24, "valid": 12, "test": 18})
    monkeypatch.setattr("mmpre.evaluation.fine_tuning.MOST", {"train": 24, "valid": 12, "test": 18})
    answer = evaluate(pictures[1], sets=[with_tasks(pictures[0], TUNED | {"epochs": 1})], untrained=False)
    tuned, bags = (results(answer, who)["brightness: fine-tuned"] for who in ("trained", "trivial"))
    assert tuned["n"] == bags["n"] == 18 and bags["protocol"]["train rows"] == tuned["protocol"]["train windows"] == 24


def test_labels_that_mean_nothing_are_not_learned(pictures, tmp_path):
    def shuffled(i):
        return grey_picture(i) | {"cls": str(np.random.default_rng(i + 999).integers(0, 3))}

    counts = (("train", 60), ("valid", 30), ("test", 200))
    folder = write_set(tmp_path / "made", [TUNED | {"epochs": 2}], shuffled, counts)
    found = results(evaluate(pictures[1], sets=[folder], untrained=False))["brightness: fine-tuned"]
    assert found["low"] < 0.36 and found["value"] < 0.45
    assert results(evaluate(pictures[1], sets=[folder], untrained=False))["brightness: fine-tuned"] == found


VOWELS = {"kind": "sequence labelling", "about": "vowels", "input": "txt", "target": "json:labels", "epochs": 25}


def spelled(i):
    """Words, and for each of their characters whether it is a vowel."""
    text = " ".join(WORDS[n] for n in np.random.default_rng(i).permutation(5))
    return {"txt": text, "json": json.dumps({"labels": "".join("V" if c in "aeiou" else "C" for c in text)})}


def test_each_token_gets_the_label_of_its_character(texts, tmp_path):
    folder = write_set(tmp_path / "made", [VOWELS], spelled)
    answer = evaluate(texts[1], sets=[folder], untrained=False)
    for who in ("trained", "trivial"):
        found = results(answer, who)
        assert found["vowels: labels of tokens"]["value"] > 0.97 > found["vowels: labels of tokens"]["chance"]
        assert found["vowels: F1 of the rarer labels"]["value"] > 0.9
    assert results(answer)["vowels: labels of tokens"]["protocol"]["commonest"] == "C"


def test_labels_that_do_not_fit_the_text_are_told(texts, tmp_path):
    def short(i):
        return {"txt": "five", "json": json.dumps({"labels": "CVC"})}

    folder = write_set(tmp_path / "made", [VOWELS, VOWELS | {"about": "none", "target": "json:no"}], short)
    told = evaluate(texts[1], sets=[folder], untrained=False)["not measured"]
    assert told["made: vowels"] == (
        "sequence labelling: wanted a label for each of 4 characters of sample 000, got 3; write one for each of the "
        "characters into the task's target"
    )
    assert told["made: none"] == "sequence labelling: train has no sample with .txt and json:no that can be used"


SAID = {"kind": "transcription", "about": "said", "input": "txt", "target": "json:said", "epochs": 40}


def drawn_out(i):
    """Letters that are each written three times, and the letters."""
    letters = [("A", "b", "c", "d")[n] for n in np.random.default_rng(i).permutation(4)]
    return {"txt": "".join(3 * one for one in letters), "json": json.dumps({"said": "".join(letters)})}


def test_what_is_drawn_out_is_transcribed_and_an_empty_answer_is_chance(texts, tmp_path):
    folder = write_set(tmp_path / "made", [SAID], drawn_out, (("train", 96), ("valid", 24), ("test", 24)))
    found = results(evaluate(texts[1], sets=[folder], untrained=False))["said: character error rate"]
    assert found["value"] < 0.3 and found["chance"] == 1.0 and found["less"] and found["n"] == 24
    assert found["protocol"]["letters"] == 4


def test_characters_are_read_and_counted_as_they_should_be():
    score_nC = torch.eye(3)[[0, 1, 1, 0, 1, 2, 2, 0]]
    assert _decoded(score_nC, "ab") == "aab"
    assert _needed(torch.tensor([1, 1, 2])) == 4
    edits, lengths = _edits(["aab", "", "ab"], ["ab", "abc", "ab"])
    assert edits.tolist() == [1, 3, 0] and lengths.tolist() == [2, 3, 2]


@pytest.mark.parametrize("kind", ["fine-tuning", "sequence labelling", "transcription"])
def test_a_network_that_does_not_read_the_input_is_not_trained(pictures, texts, kind):
    task = {"kind": kind, "about": "words", "input": "txt", "target": "json:said"}
    told = evaluate(pictures[1], sets=[with_tasks(texts[0], task)], untrained=False)["not measured"]["made: words"]
    assert told.startswith(f"{kind}: wanted a reader of .txt, the run reads .jpg, ")
    assert told.endswith("; measure a run that reads it")


@pytest.mark.parametrize(
    ("task", "card", "message"),
    [
        (
            {"kind": "regression", "about": "told", "input": "png", "target": "txt"}, {},
            "regression: wanted a number as txt of sample 000, got 'dark one'; look at the task's target",
        ),
        (
            {"kind": "classification", "about": "told", "input": "png", "target": "cls", "labels": ["1"]}, {},
            "classification: wanted samples of two classes in train, got 1 alone; look at the task's target and labels",
        ),
        (
            {"kind": "retrieval", "about": "told", "input": "png", "target": "png"}, {},
            "made: told: png to png: none of 30 queries has a right item; look at the task's target and group",
        ),
        (
            {"kind": "few-shot", "about": "told", "input": "jpg", "target": "cls"}, {},
            "no sample has a .jpg that role 'image_patches' can read; look at the shards with `mmpre data inspect`",
        ),
        (
            {"kind": "few-shot", "about": "told", "input": "png", "target": "cls", "valid": "other"}, {},
            "which layer and strength could be chosen on; build that split, or name another one as the task's valid",
        ),
    ],
)  # fmt: skip
def test_a_task_that_its_data_does_not_allow_is_told_and_the_others_are_measured(pictures, task, card, message):
    folder, run = pictures
    other = {"kind": "classification", "about": "probed", "input": "png", "target": "cls"}
    answer = evaluate(run, sets=[with_tasks(folder, task, other, **card)], untrained=False)
    assert answer["not measured"]["made: told"].endswith(message)
    assert results(answer)["probed: linear probe"]["value"] > 0.5
    assert not any(name.startswith("told") for name in results(answer, "trivial"))


@pytest.mark.parametrize(("names", "got"), [(["a", "b"], "'2'"), (["a", "b", "c", "d"], "'light one'")])
def test_labels_that_the_list_of_classes_does_not_name_are_told(tmp_path, pictures, names, got):
    def sample(i):
        return grey_picture(i) | ({"cls": "light one"} if "light" in got and i % 3 == 2 else {})

    folder = write_set(tmp_path / "made", [ZERO], sample, (("train", 12), ("test", 12)), classes=names)
    towers = dict(patch_px=8, side_px=16, width=16, depth=1, heads=2, shared=8, batch=12, steps=2, warmup=1)
    run = mmpre.train("two_towers", scale="tiny", out=tmp_path / "run", data=(f"{folder}/train",), **towers)
    assert evaluate(run, sets=[folder], untrained=False)["not measured"]["made: brightness"] == (
        f"zero-shot: wanted a number below {len(names)} as cls, which the card's classes are counted by, got {got}; "
        "mend the labels, or the card's list of classes"
    )


@pytest.mark.parametrize("score", ["nan", "1e999", "one"])
def test_a_number_that_is_no_number_is_told(texts, tmp_path, score):
    folder = write_set(tmp_path / "made", [SIMILAR], lambda i: {
        "json": json.dumps(json.loads(word_pair(i)["json"]) | {"score": score})
    })  # fmt: skip
    told = evaluate(texts[1], sets=[folder], untrained=False)["not measured"]["made: words"]
    assert told == (
        f"similarity: wanted a number as json:score of sample 000, got {score!r}; look at the task's target"
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": "a {}"}, r"task 0 has prompts 'a \{\}'; wanted a list of texts, \[\"...\", ...\]"),
        ({"labels": [1, 2]}, "task 0 has labels .1, 2.; wanted a list of texts"),
        ({"epochs": "3"}, "task 0 has epochs '3'; wanted a whole number above 0"),
        ({"group": 3}, "task 0 has group 3; wanted a text"),
        ({"input": None}, "task 0 has input None; wanted a text"),
    ],
)
def test_fields_of_another_type_are_told_when_the_card_is_read(changed, message, tmp_path):
    task = {"kind": "zero-shot", "about": "x", "input": "png", "target": "cls"}
    with pytest.raises(CardError, match=message):
        card_tasks(with_tasks(tmp_path, task | changed))
    with pytest.raises(CardError, match="task 0 has no about and no target; add it"):
        card_tasks(with_tasks(tmp_path, {"kind": "zero-shot", "input": "png"}))
    with pytest.raises(CardError, match="task 0 has classes 3; wanted a list of texts"):
        card_tasks(with_tasks(tmp_path, task, classes=3))
    (tmp_path / "card.json").write_text(json.dumps({"name": "x", "tasks": {}}))
    with pytest.raises(CardError, match=r"name must be a text and tasks a list, got 'x' and \{\}"):
        card_tasks(tmp_path)
