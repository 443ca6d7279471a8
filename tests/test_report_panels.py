"""What a report shows of a network: guesses, pictures, attention, transport, retrieval, maps, of any modality."""

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import small_runs
import sounds
import torch
from parity_text import WORDS
from PIL import Image
from small_runs import EVIL
from test_report import text_of

from mmpre.attention import Full
from mmpre.attention.backends import attend, attention_probabilities, watched
from mmpre.command_line.cli import main
from mmpre.data.sample import Sample
from mmpre.data.shard_writer import shard_writer
from mmpre.draw import Draw
from mmpre.evaluation.cards import CardTask
from mmpre.heads.guess import Choice
from mmpre.heads.pixels import Pixels
from mmpre.heads.vocabulary import Vocabulary
from mmpre.layout import Layout
from mmpre.modalities.code_graph import CodeReader
from mmpre.modalities.dna import DnaReader
from mmpre.modalities.image_patches import ImagePatches, ImageReader
from mmpre.modalities.speech import FbankReader, Speech
from mmpre.modalities.text import TextReader
from mmpre.report import attention, panels, predictions, retrieval, states, transport
from mmpre.report.drawing import boxes, draw, heat, in_little, pieces
from mmpre.report.opened import earlier, open_run
from mmpre.report.page import report
from mmpre.tokens import Tokens
from mmpre.view import View

TESTS = Path(__file__).parent
DRAW = Draw.row(0, 0, 0, epoch=0, unit=0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return folder, small_runs.pairs(folder)


@pytest.fixture(scope="module")
def pair_run(shards, tmp_path_factory):
    folder, data = shards
    return small_runs.uniter(folder, tmp_path_factory.mktemp("runs") / "pairs", **data)


@pytest.fixture(scope="module")
def picture_run(shards, tmp_path_factory):
    return small_runs.mae(tmp_path_factory.mktemp("runs") / "pictures", **shards[1])


def pictures_of(path):
    return re.findall(r'(?:src|href)="data:image/(\w+);base64,([^"]+)"', path.read_text())


def picture_tokens(side_px=16, patch_px=8):
    sample = Sample("a", "shard", "digest", {"png": small_runs.picture(3, side_px)})
    reader = ImageReader(patch_px)
    return reader, reader.tokenize(sample, DRAW), sample


def test_a_choice_is_the_softmax_of_the_scores_that_the_loss_is_taken_of():
    torch.manual_seed(0)
    head = Vocabulary(torch.nn.Embedding(9, 8))
    tokens = Tokens.of_row(torch.full((4,), -1), ids=torch.tensor([3, 1, 8, 3]))
    state_MD, index_M = torch.randn(3, 8), torch.tensor([0, 2, 3])
    guess = head.guess(state_MD, tokens, index_M)
    assert guess.field == "ids" and guess.true_M.tolist() == [3, 8, 3]
    scores_MV = head.scores(state_MD)
    assert torch.equal(guess.best_MK, scores_MV.topk(5, dim=1).indices)
    torch.testing.assert_close(guess.share_MK, scores_MV.softmax(1).gather(1, guess.best_MK))
    every = Choice.of("ids", scores_MV[:, :4], guess.true_M)
    assert every.best_MK.shape == (3, 4)
    torch.testing.assert_close(every.share_MK.sum(1), torch.ones(3))


@pytest.mark.parametrize("normalise", [True, False])
def test_pixels_that_are_predicted_rightly_are_the_picture_again(normalise):
    reader, tokens, _ = picture_tokens()
    image = ImagePatches(reader, width=8)
    head = Pixels(4, 3 * 64, image.features, normalise=normalise)
    index_M = torch.tensor([1, 3])
    target_ME, _ = head.target(tokens, index_M)
    head.predict = lambda state_MD: target_ME
    f_NE = image.features(tokens).clone()
    f_NE[index_M] = 0
    f_NE[index_M] = head.guess(torch.zeros(2, 4), tokens, index_M).value_ME
    assert torch.equal(image.restored(tokens, f_NE)["patch"][1:], tokens["patch"][1:])


def test_frames_have_their_features_again():
    reader = FbankReader()
    tokens = reader.tokenize(sounds.sample(sounds.sound(0.5)), DRAW)
    speech = Speech(reader, width=8)
    torch.nn.init.normal_(speech.norm.weight, 1.0, 0.1)
    torch.nn.init.normal_(speech.norm.bias)
    again = speech.restored(tokens, speech.features(tokens))
    torch.testing.assert_close(again["frame"], tokens["frame"], atol=1e-4, rtol=0)


def test_tokens_of_dna_and_code_say_what_they_stand_for():
    reader = DnaReader(length=6)
    tokens = reader.tokenize(Sample("a", "s", "d", {"fa": b">r\nACGTNA\n"}), DRAW)
    assert reader.texts(tokens) == ["[CLS]", *"ACGTNA", "[SEP]"]
    ids_N = tokens["ids"].clone()
    ids_N[1] = reader.cutter.mask  # a head may predict it
    assert reader.texts(tokens.with_values(ids=ids_N))[1] == "[MASK]"
    reader = CodeReader("bytes")
    program = Sample("a", "s", "d", {"py": b"a = 1\nb = a\n"})
    tokens = reader.tokenize(program, DRAW)
    texts = reader.texts(tokens)
    assert "".join(texts).removeprefix("[CLS]").partition("[SEP]")[0].split() == "a = 1 b = a".split()
    assert [text == "" for text in texts] == tokens["node"].tolist()
    drawn = draw(reader, "code", tokens, torch.zeros(len(tokens), dtype=torch.bool), program)
    assert drawn.picture and not drawn.pieces  # arcs say what letters cannot


def test_watched_attention_is_what_attend_computes_with():
    torch.manual_seed(0)
    plan = Full().plan(Layout({"a": torch.tensor([3, 5])}))
    q, k, v = torch.randn(3, 8, 2, 4)
    with watched() as calls:
        y_NHK = attend(q, k, v, plan)
    attend(q, k, v, plan)
    assert len(calls) == 1
    for weight, expected in zip(calls[0], attention_probabilities(q, k, plan), strict=True):
        assert torch.equal(weight, expected)
    parts = zip(calls[0], v.split([3, 5]), strict=True)
    again = torch.cat([torch.einsum("hnm,mhk->nhk", weight_Hnm, v_mHK) for weight_Hnm, v_mHK in parts])
    torch.testing.assert_close(y_NHK, again)


def test_boxes_are_where_patches_stand():
    reader, tokens, sample = picture_tokens(side_px=32, patch_px=16)
    tokens["patch"].clamp_(max=100)  # grey hides nothing that is grey
    found = boxes(reader, tokens, sample)
    assert found[0] is None  # [CLS] has no place
    side = max(box[2] for box in found[1:])
    corners = [(x, y) for y in (0, side / 2) for x in (0, side / 2)]
    for (x, y), box in zip(corners, found[1:], strict=True):
        assert np.abs(np.array(box) - (x, y, x + side / 2, y + side / 2)).max() <= 16, box


def test_pieces_know_their_words_and_what_is_hidden():
    reader = TextReader("bytes")
    tokens = reader.tokenize(Sample("a", "s", "d", {"txt": b"ab c"}), DRAW)
    hidden_N = torch.tensor([False, True, False, False, False, False])
    made = pieces(reader, tokens, hidden_N)
    assert [one.text for one in made] == ["[CLS]", "a", "b", " ", "c", "[SEP]"]
    assert [one.hidden for one in made] == hidden_N.tolist()
    assert [one.gap for one in made] == [True, True, False, False, False, True]  # the space is itself the gap
    assert [one.special for one in made] == [True, False, False, False, False, True]


def test_a_hidden_space_has_a_sign():
    reader = TextReader("bytes")
    tokens = reader.tokenize(Sample("a", "s", "d", {"txt": b"ab c"}), DRAW)
    made = pieces(reader, tokens, torch.tensor([False, False, False, True, False, False]))
    assert [(one.text, one.gap) for one in made[3:5]] == [("␣", False), ("c", False)]


def test_programs_are_text_without_their_nodes_where_there_is_little_room():
    reader = CodeReader("bytes")
    sample = Sample("a", "s", "d", {"py": b"def f(x):\n    y = x\n    return y\n"})
    tokens = reader.tokenize(sample, DRAW)
    assert draw(reader, "code", tokens, torch.zeros(len(tokens), dtype=torch.bool), sample).picture
    drawn, kept = in_little(reader, "code", tokens, sample)
    assert not drawn.picture and "".join(one.text for one in drawn.pieces[1:-1]).split()[:2] == ["def", "f"]
    assert kept == (~tokens["node"]).nonzero().squeeze(1).tolist() and len(drawn.pieces) == len(kept) < len(tokens)
    reader, tokens, sample = picture_tokens()
    drawn, kept = in_little(reader, "image", tokens, sample)
    assert drawn.picture and kept == list(range(len(tokens)))


def test_the_page_of_words_and_regions(pair_run, shards):
    out = report([pair_run])
    text, said = out.read_text(), text_of(out)
    assert "Left out" not in said
    assert EVIL in said and "<script>alert" not in text
    for part in ("mlm what is hidden, and what it is taken for", "mrckl what is hidden", "text over image",
                 "retrieval, text to image", "map of rows", "nearest rows", "attention of one row"):  # fmt: skip
        assert part in said, part
    assert "mrfr what is hidden" not in said  # its regions are shown already, and it has nothing to add
    kinds = [kind for kind, _ in pictures_of(out)]
    assert kinds.count("webp") > 20 and kinds.count("png") == 2 * (1 + 2)  # two layers of two heads
    assert str(shards[1]["valid"][0]) in said


def test_guesses_of_words_and_classes_have_names_and_probabilities(pair_run):
    found = {panel.title: panel for panel in predictions.panels(open_run(pair_run))}
    assert set(found) == {"mlm", "mrckl"}
    for example in found["mlm"].examples:
        hidden = [piece.text for drawn in example.roles for piece in drawn.pieces if piece.hidden]
        assert [one.true for one in example.taken] == hidden and set(hidden) <= set(WORDS)
        for one in example.taken:
            shares = [share for _, share in one.best]
            assert len(one.best) == 5 and shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
            assert one.right == (one.best[0][0] == one.true)
    regions = [one for example in found["mrckl"].examples for one in example.taken]
    assert {one.true for one in regions} <= {str(i) for i in range(7)} and all(one.place for one in regions)


def test_shares_of_words_are_those_of_the_plan(pair_run):
    (panel,) = transport.panels(open_run(pair_run))
    for row in panel.rows:
        assert row.words and row.drawn.picture and all(box is not None for box in row.placed)
        for word, shares in row.words:
            assert word in WORDS and len(shares) == len(row.placed)
            assert sum(shares) == pytest.approx(1, abs=0.01)


def test_retrieval_orders_by_the_evaluation_s_scores(pair_run):
    opened = open_run(pair_run)
    (retrieved,) = retrieval.of_evaluations(opened)
    samples = [sample for _, sample in opened.samples(retrieval.POOL)]
    score_PP = opened.recipe.evaluations[0].scores(samples, opened.processes).numpy()
    for q, one in zip((0, 8, 15, 23), retrieved.found, strict=True):
        assert [piece.text for piece in one.query[0].pieces[1:-1]] == samples[q].text().split()
        assert [score for _, score, _ in one.results] == pytest.approx(sorted(score_PP[q], reverse=True)[:4])
        place = int((score_PP[q] > score_PP[q, q]).sum())
        assert [right for *_, right in one.results] == [i == place for i in range(4)]


def test_towers_retrieve_by_the_vectors_that_they_are_trained_on(shards, tmp_path):
    run = small_runs.train(TESTS / "towers.py", tmp_path / "run", **shards[1])
    opened = open_run(run)
    (retrieved,) = retrieval.of_tasks(opened)
    assert retrieved.title == "retrieval, text to image" and "4 best of 24" in retrieved.about
    for one in retrieved.found:
        assert one.query[0].pieces and all(drawn[0].picture for drawn, *_ in one.results)
        cosines = [cosine for _, cosine, _ in one.results]
        assert cosines == sorted(cosines, reverse=True) and max(map(abs, cosines)) <= 1.001
    said = text_of(report([run]))
    assert "Left out" not in said and "retrieval, text to image" in said


STAGES = """
from dataclasses import replace
from mmpre.recipe import Recipe
from mmpre.recipes.bert import bert
from mmpre.recipes.masked import masked

SMALL = dict(width=16, depth=1, heads=2, length=16, batch=4, micro_batches=1, steps=2, warmup=1)


def pictures_then_words(data: tuple[str, ...] = (), valid: tuple[str, ...] = (), words: str = "") -> Recipe:
    first = masked(data=data, valid=valid, modality="image_patches", patch_px=8, **SMALL)
    second = bert(data=data, valid=valid, tokenizer=words, dropout=0.0, **SMALL)
    one, (two,) = first.stages[0], second.stages
    return Recipe([one, replace(two, tasks=[*two.tasks, replace(two.tasks[0], name="again")])], second.network)
"""


def test_tasks_of_earlier_stages_are_shown_behind_those_of_the_last_one(shards, tmp_path):
    (tmp_path / "pictures_then_words.py").write_text(STAGES)
    words = str(shards[0] / "tokenizer.json")
    run = small_runs.train(tmp_path / "pictures_then_words.py", tmp_path / "run", words=words, **shards[1])
    _, made, left_out = panels.panels(open_run(run), run)
    titles = [one.title for one in made]
    assert titles[:3] == ["mlm", "again", "masked, stage 1"] and titles[3:] == [
        "map of rows",
        "nearest rows",
        "attention",
    ]
    assert left_out == [] and made[2].examples[0].filled
    ((number, before),) = earlier(open_run(run))
    assert number == 1 and [task.name for task in before.tasks] == ["masked"] and before.held_out


def test_the_map_and_the_neighbours_are_of_mean_states(pair_run):
    opened = open_run(pair_run)
    made, nearest = states.panels(opened)
    assert len(made.maps) == 1 and len(made.maps[0].dots) == len(opened.units) == 24
    assert made.maps[0].names == [] and {dot.colour for dot in made.maps[0].dots} == {0}
    for one in nearest.found:
        cosines = [cosine for _, cosine, _ in one.results]
        assert cosines == sorted(cosines, reverse=True) and max(cosines) < 1 and not any(r for *_, r in one.results)
    network = opened.network
    rows = [one.row for one in opened.rows(View(), network.readers, 5)]
    together = states.states(opened, network, rows)
    alone = np.concatenate([states.states(opened, network, [row]) for row in rows])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_labels_come_from_the_card():
    def sample(group, cls):
        return Sample("a", "s", "d", {"json": f'{{"group": "{group}"}}'.encode(), "cls": cls, "txt": b"x" * 70})

    def task(kind, about, target, **more):
        return CardTask(folder=Path(), set="s", kind=kind, about=about, input="png", target=target, **more)

    samples = [sample("fruit", b"1"), sample("bird", b"2"), sample("fruit", b"1"), sample("bird", b"7")]
    tasks = [task("regression", "not a class", "cls"), task("classification", "the group", "json:group"),
             task("classification", "texts", "txt"), task("classification", "missing", "json:other"),
             task("classification", "the class", "cls", names=("zero", "one", "two"), labels=("1", "2"))]  # fmt: skip
    assert states.labels(tasks[:4], samples) == [("the group", ["fruit", "bird", "fruit", "bird"])]
    assert states.labels(tasks[4:], samples + samples) == [("the class", ["one", "two", "one", ""] * 2)]
    assert states.labels([], samples) == []


def test_the_map_has_the_colours_of_the_card(tmp_path):
    task = {"kind": "classification", "about": "high or low", "input": "notes", "target": "cls"}
    (tmp_path / "card.json").write_text(json.dumps({"name": "it", "classes": ["low", "high"], "tasks": [task]}))
    with shard_writer(tmp_path / "train") as sink:
        for i in range(20):
            sink.write({"__key__": f"m{i}", "notes": f"{i % 2} {i} 2", "cls": str(i % 2)})
    run = small_runs.train(TESTS / "tones.py", tmp_path / "run", data=[str(tmp_path / "train")], steps=6)
    made, _ = states.panels(open_run(run))
    assert made.maps[0].title == "map of rows, by high or low" and made.maps[0].names == [("low", 0), ("high", 1)]
    assert [dot.colour for dot in made.maps[0].dots] == [0, 1] * 10
    (tmp_path / "card.json").write_text(json.dumps({"name": "it", "tasks": [{"kind": "nonsense"}]}))
    assert states.panels(open_run(run)).__next__().maps[0].names == []


def test_the_page_of_pictures(picture_run):
    said = text_of(report([picture_run]))
    assert "Left out" not in said
    for part in ("the row", "what is seen", "filled in", "nearest rows", "attention of one row"):
        assert part in said, part
    (panel,) = predictions.panels(open_run(picture_run))
    assert len(panel.examples) == predictions.ROWS
    for example in panel.examples:
        assert [title for title, _ in example.filled] == ["the row", "what is seen", "filled in"]
        assert len({drawn.picture for _, drawn in example.filled}) == 3


def test_attention_is_laid_over_patches(picture_run):
    (panel,) = attention.panels(open_run(picture_run))
    assert [layer.name for layer in panel.layers] == ["layer 1", "layer 2"]
    for _, (over,) in panel.over:
        shares = [share for _, share in over.placed]
        assert len(shares) == 16 and max(shares) == 1 and min(shares) == 0
        assert 0 < over.low < 1 / 17 < over.high < 1
    opened = open_run(picture_run)
    shown = next(opened.rows(View(), opened.recipe.network.readers, 1))
    for weight_Hnn in attention.weights_of(opened, opened.recipe.network, shown):
        assert weight_Hnn.shape == (2, 17, 17)
        np.testing.assert_allclose(weight_Hnn.sum(2), 1, atol=1e-5)


@pytest.fixture(scope="module")
def melodies(tmp_path_factory):
    folder = tmp_path_factory.mktemp("melodies")
    with shard_writer(folder) as sink:
        for i in range(20):
            sink.write({"__key__": f"m{i}", "notes": " ".join(str(0.2 * n + i) for n in range(4 + i % 3))})
    return [str(folder)]


@pytest.mark.parametrize("name", ["tones", "shown_tones"])
def test_a_modality_of_one_outside_file_is_shown(name, melodies, tmp_path):
    run = small_runs.train(TESTS / f"{name}.py", tmp_path / "run", data=melodies, steps=6)
    out = report([run])
    said = text_of(out)
    assert "Left out" not in said and "trained on (it has no held-out ones)" in said
    assert "pitch what is hidden" in said and "attention of one row" in said and len(pictures_of(out)) > 10
    assert ("filled in" in said) == (name == "shown_tones")


def test_a_page_does_without_weights_and_without_data(shards, pair_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(pair_run, run)
    shutil.rmtree(run / "checkpoints")
    said = text_of(report([run]))
    assert "Left out of this page what the network of" in said and "Curves" in said
    moved = tmp_path / "moved"
    shutil.copytree(shards[0] / "valid", moved)
    other = small_runs.bert(shards[0], tmp_path / "bert", data=shards[1]["data"], valid=[str(moved)])
    shutil.rmtree(moved)
    said = text_of(report([other]))
    assert "Left out of this page what the network of" in said and str(moved) in said
    assert "name other shards by --data" in said
    assert main(["report", str(other), "--data", *shards[1]["valid"]]) is None
    assert "Left out" not in text_of(other / "report.html")


def test_code_of_others_that_fails_costs_its_part_alone(pair_run, monkeypatch):
    def broken(*_):
        raise RuntimeError("<b>no</b>")

    monkeypatch.setattr(Vocabulary, "guess", broken)
    out = report([pair_run])
    assert "predictions of" in text_of(out) and "RuntimeError: <b>no</b>" in text_of(out)
    assert "<b>no</b>" not in out.read_text() and "attention of one row" in text_of(out)


def test_heat_is_clearer_where_weights_are_smaller():
    url = heat(np.array([[0.0, 0.5], [1.0, 0.25]]))
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    alpha = np.array(picture)[..., 3]
    assert alpha[0, 0] == 0 and alpha[1, 1] < alpha[0, 1] < alpha[1, 0]
