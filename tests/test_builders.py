"""Each builder on a tiny package in the layout of the real one: what it takes, where it puts it, what it leaves out."""

import hashlib
import io
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import packages as fake
import pytest
from PIL import Image, ImageDraw
from small_sets import LEVELS, MAKERS, PROMPTS, make_animal_shapes, png, sound, webp

from mmpre.data.index import open_shards
from mmpre.data.shards import ShardReader
from mmpre.data_tools import (
    animal_shapes,
    asterisk,
    augustus,
    digits,
    fillets,
    fluent_emoji,
    moving,
    openclipart,
    openmoji_pictures,
    pyrodigal_genome,
    ragout,
    stdlib,
    tuxpaint_stamps,
    wordnet,
)  # fmt: skip
from mmpre.data_tools.archives import ArchiveError
from mmpre.data_tools.concept import Concept
from mmpre.data_tools.genomes import PIECE, Gene, Sequence
from mmpre.data_tools.packages import PackageMissingError
from mmpre.data_tools.split import split_of


def samples(out):
    """Every sample by key: its split, and its members, decoded where they are text."""
    found = {}
    for folder in sorted({path.parent for path in out.rglob("*.tar")}):
        shards = open_shards(folder)
        reader = ShardReader(shards)
        for n in range(len(shards)):
            members = {suffix: _decoded(suffix, content) for suffix, content in reader.read(n).items()}
            assert shards.key(n) not in found
            found[shards.key(n)] = folder.name, members
    return found


def _decoded(suffix, content):
    kind = suffix.rpartition(".")[2]
    if kind == "json":
        return json.loads(content)
    if kind == "fa":
        header, bases = content.decode().splitlines()
        assert header.startswith(">")
        return bases
    return content.decode() if kind in ("txt", "py", "cls", "genes") else content


def card(out):
    return json.loads((out / "card.json").read_text())


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Each set, built once from its small package."""
    done = {}

    def build(module):
        if module not in done:
            folder = tmp_path_factory.mktemp(module.__name__.rpartition(".")[2])
            source = MAKERS[module](folder)
            done[module] = module.build(folder / "out", source=source), source
        return done[module][0]

    build.source = lambda module: (build(module), done[module][1])[1]
    return build


@pytest.mark.parametrize("module", MAKERS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_card_fits_the_shards_and_a_second_build_gives_the_same_bytes(built, module, tmp_path):
    out = built(module)
    told, found = card(out), samples(out)
    assert sum(told["counts"].values()) == len(found) > 0
    for split, count in told["counts"].items():
        assert sum(place == split for place, _ in found.values()) == count
    assert told["licence"] == module.licence and told["split"]
    assert [task["about"] for task in told["tasks"]] == [task.about for task in module.tasks]
    assert all(source["version"] for source in told["sources"])

    for task in told["tasks"]:
        within = Path(task.get("split", "")).parent  # a task may ask another set beside the splits
        of_task = found if within == Path() else samples(out / within)
        if not of_task:  # the small package is too small for them
            continue
        members = {suffix for _, sample in of_task.values() for suffix in sample}
        fields = {f"json:{name}" for _, sample in of_task.values() if "json" in sample for name in sample["json"]}
        named = {task[name] for name in ("input", "target", "group") if name in task}
        there = members | fields
        assert all(there & set(name.split("|")) or (out / name).exists() for name in named), named

    module.build(tmp_path / "again", source=built.source(module))
    again = card(tmp_path / "again")
    assert again == told
    for name, digest in told["sha256"].items():
        assert hashlib.sha256((tmp_path / "again" / name).read_bytes()).hexdigest() == digest


def test_stdlib_takes_documented_functions_of_middle_length_without_their_docstrings(built):
    found = samples(built(stdlib))
    assert {key.rpartition("-")[0] for key in found} == {"lib/__future__", "lib/a", "lib/b_c", "lib/f"}
    card = json.loads((built(stdlib) / "card.json").read_text())
    assert card["split"].endswith("; 3 copies left out") and split_of("h.py") == "valid"
    for module in ("__future__.py", "a.py", "b.c.py"):
        mine = {about["json"]["name"]: (place, about) for place, about in found.values()
                if about["json"]["module"] == module}  # fmt: skip
        assert set(mine) == {"method", "inner", "told"}
        assert {place for place, _ in mine.values()} == {split_of(module)}
        assert mine["method"][1]["txt"] == f"Say what {module} is."
        assert mine["inner"][1]["py"] == f'def inner():\n    return "é {module}" * x\n'
        assert mine["told"][1] == {
            "txt": f"Three words of {module}.", "py": f"async def told(\n    a,\n): return a, {module!r}\n",
            "json": {"module": module, "name": "told", "line": 14, "lines": 3},
        }  # fmt: skip
        # the outer function keeps the docstring of the inner one, which is code of its own
        assert "Say what" not in mine["method"][1]["py"] and f"{module}'s count" in mine["method"][1]["py"]


def test_wordnet_keeps_one_direction_of_each_relation_and_each_relation_once(built):
    out = built(wordnet)
    found = samples(out)
    assert set(found) == {"n00001740", "n00001930", "a00000100", "v00000200"}
    dog = found["n00001930"][1]
    assert dog["txt"] == 'an animal; "a dog barked"; "dogs"'
    assert dog["json"] == {
        "synset": "n00001930", "class": "noun.animal", "lemmas": ["big dog", "Hound"], "definition": "an animal",
        "examples": ["a dog barked", "dogs"],
        "relations": [["hypernym", "n00001740"], ["part_holonym", "n00001740"]],
    }  # fmt: skip
    assert found["a00000100"][1]["json"]["lemmas"] == ["galore"]
    assert found["v00000200"][1]["json"]["lemmas"] == ["sé"]
    lines = {split: (out / "triples" / f"{split}.tsv").read_text().splitlines() for split in ("train", "valid", "test")}
    both = ["n00001740\tderivation\ta00000100", "a00000100\tderivation\tn00001740"]
    assert sorted(line for some in lines.values() for line in some) == sorted(
        ["n00001930\thypernym\tn00001740", "n00001930\tpart_holonym\tn00001740", *both]
    )
    assert any(set(both) <= set(some) for some in lines.values()), "both directions in one split"
    assert all(place == split_of(key) for key, (place, _) in found.items())


def test_openmoji_leaves_out_flags_skin_tones_and_what_has_no_tags(built):
    found = samples(built(openmoji_pictures))
    assert set(found) == {f"A{i}" for i in range(8)}
    place, one = found["A3"]
    assert one["txt"] == "thing 3" and place == split_of("thing 3")
    assert one["json"]["tags"] == ["a", "b"] and one["json"]["subgroup"] == "fruit"
    picture = pixels(one["png"])
    assert picture.shape == (72, 144, 4), "millimetres are drawn, the longer side as long as asked for"
    assert tuple(picture[30, 30]) == (255, 0, 0, 255)


def test_digits_and_animals_have_names_and_equal_pictures_stand_together(built):
    found = samples(built(digits))
    assert found["000007"][1]["txt"] == "seven" and found["000007"][1]["cls"] == "7"
    assert pixels(found["000000"][1]["png"]).tolist()[0] == [0, 15, 31, 47, 63, 79, 95, 111]
    assert pixels(found["000000"][1]["png"])[2, 0] == 255
    found = samples(built(animal_shapes))
    assert [found[f"{n:06d}"][1]["txt"] for n in (0, 3, 4, 39)] == ["bear", "bear", "bird", "zebra"]
    assert found["000000"][0] == found["000001"][0]


class Harm:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_only_arrays_of_numbers_are_unpickled(tmp_path):
    for what, message in [(Harm(), "asks for builtins.exec; only arrays are read"),
                          ([Image.new("L", (1, 1))], r"asks for PIL\.")]:  # fmt: skip
        (tmp_path / "p").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=message):
            animal_shapes.build(tmp_path / "out", source=make_animal_shapes(tmp_path / "p", what))
    with pytest.raises(ValueError, match=r"wanted bytes of shape .*, got \(41, 2, 2\)"):
        animal_shapes.build(tmp_path / "out", source=make_animal_shapes(tmp_path / "p", np.zeros((41, 2, 2), np.uint8)))
    assert not (tmp_path / "out").exists()


def test_asterisk_keeps_a_prompt_of_all_languages_in_one_split_and_drops_tones(built):
    out = built(asterisk)
    found = samples(out)
    assert set(found) == {f"{lang}/{prompt}" for lang in asterisk.LANGUAGES for prompt in PROMPTS}
    for key, (place, one) in found.items():
        lang, _, prompt = key.partition("/")
        assert place == split_of(prompt)
        assert one["txt"] == f"{prompt}: in {lang} é"
        assert one["json"] == {"language": lang, "prompt": prompt, "speaker": f"{lang}_XX_f_A", "seconds": 0.1}
        assert one["wav"] == sound()
    assert {path.name for path in (out / "train").glob("*.tar")} == {f"{x}-000000.tar" for x in asterisk.LANGUAGES}
    assert len(open_shards(out / "train" / "fr-*.tar")) == sum(split_of(p) == "train" for p in PROMPTS)


def test_augustus_reads_its_genes_from_base_two_million_on(built):
    found = samples(built(augustus))
    place, first = found["chr2R-002000000"]
    assert place == "probe" and first["json"]["start"] == 2_000_000 and first["json"]["end"] == 2_000_000 + PIECE
    assert first["json"]["transcripts"] == [
        {"name": "1", "strand": "+", "coding": [[2_000_100, 2_000_105], [2_000_205, 2_000_209]]}
    ]
    assert first["fa"][100:105] + first["fa"][205:209] == "ATGGCCTAA"
    assert first["genes"][98:107] == "..01201ii" and first["genes"][203:211] == "ii2012.."
    place, test = found["chr2R-006000000"]
    assert place == "test" and test["fa"][:10] == "tttTTACATt" and test["genes"][:10] == "...cbacba."
    splits = {split: [(one["json"]["start"], one["json"]["end"]) for place, one in found.values() if place == split]
              for split in ("train", "valid", "probe", "test")}  # fmt: skip
    assert sum(end - start for some in splits.values() for start, end in some) == 21_000_000
    assert not any(start < 7_000_000 and end > 2_000_000 for start, end in splits["train"] + splits["valid"])
    assert all("genes" not in one for place, one in found.values() if place == "train")
    told = card(built(augustus))
    assert (told["transcripts"], told["without_inner_stop"], told["beginning_with_ATG"]) == (3, 3, 3)


def test_genes_that_do_not_fit_their_chromosome_are_refused():
    genes = (Gene("a", "+", ((0, 9),)), Gene("b", "+", ((0, 8),)))
    with pytest.raises(ArchiveError, match=r"only 0 of 2 coding sequences can be translated"):
        augustus.check("TAG" * 20, genes)
    assert augustus.check("ATGCCCTAG", genes[:1])["beginning_with_ATG"] == 1


def test_ragout_tests_on_the_last_strain_of_each_species(built):
    found = samples(built(ragout))
    assert {one["json"]["strain"] for place, one in found.values() if place == "test"} == {"C"}
    assert {one["json"]["strain"] for place, one in found.values() if place != "test"} == {"A", "B"}
    _, one = found["E_Coli-A-1-000065536"]
    assert one["fa"] == "A" * 10 and one["json"]["species"] == "Escherichia coli"
    assert found["V_Cholerae-C-2-000000000"][1]["fa"] == "ACG" * 50
    assert len(found) == 4 * 3 * 3


def test_the_genes_that_pyrodigal_finds_can_be_translated(tmp_path):
    out = pyrodigal_genome.build(tmp_path / "out", source=pyrodigal_genome.packages[0].installed())
    told, every = card(out), samples(out)
    found = {key: one for key, one in every.items() if "genes" in one[1]}
    assert (told["bases"], told["genes_found"], told["coding_share"]) == (2_463_666, 2_343, 0.886)
    order = sorted(found.values(), key=lambda one: one[1]["json"]["start"])
    bases, track = ("".join(one[member] for _, one in order) for member in ("fa", "genes"))
    assert [place for place, _ in order] == sorted((place for place, _ in order), key=("train", "valid", "test").index)
    genes = {gene["name"]: gene for _, one in order for gene in one["json"]["transcripts"]}
    assert len(genes) == 2_343 and len(bases) == len(track) == 2_463_666
    through = 0
    for gene in genes.values():
        one = Gene(gene["name"], gene["strand"], tuple(map(tuple, gene["coding"])))
        through += one.is_read_through(bases)
        ((start, end),) = one.parts
        assert set(track[start:end]) <= set("012abc")
    assert through >= 2_330, "pieces at the ends may begin within a codon"

    windows = [one for key, one in every.items() if key not in found]
    assert Counter(place for place, _ in windows) == card(out / "frames")["counts"]
    assert [task["about"] for task in card(out / "frames")["tasks"]] == [
        "strand", "reading frame", "reading frame, by place modulo 3",
    ]  # fmt: skip
    of_split = {place: [one[1]["json"]["start"] for one in found.values() if one[0] == place] for place, _ in windows}
    for place, one in windows:
        start, end, frame = (one["json"][name] for name in ("start", "end", "frame"))
        assert bases[start:end] == one["fa"] and end - start == 192
        assert track[start] == frame and (one["json"]["strand"] == "+") == (frame in "012")
        assert min(of_split[place]) <= start < max(of_split[place]) + PIECE
        whole = [gene["coding"][0] for gene in genes.values()
                 if gene["coding"][0][0] <= start and end <= gene["coding"][0][1]]  # fmt: skip
        # backwards a codon begins at the gene's last base
        phases = [(start - a) % 3 if frame in "012" else (b - 1 - start) % 3 for a, b in whole]
        assert ("012abc".index(frame) % 3) in phases
    assert min(Counter(one["json"]["frame"] for _, one in windows).values()) > 0.12 * len(windows)


def test_pyrodigal_takes_a_source_and_says_that_its_program_must_be_installed(tmp_path, monkeypatch):
    with pytest.raises(PackageMissingError, match="holds no pip package pyrodigal"):
        pyrodigal_genome.build(tmp_path / "out", source=tmp_path)
    monkeypatch.setitem(sys.modules, "pyrodigal", None)
    with pytest.raises(PackageMissingError, match=r"must be installed, .* get it with `pip install pyrodigal`"):
        pyrodigal_genome.build(tmp_path / "out", fetch=True)


def test_overlapping_transcripts_and_pieces_keep_coordinates():
    genes = (Gene("a", "+", ((10, 16), (20, 23))), Gene("b", "-", ((14, 20),)))
    sequence = Sequence("s.1", "ACGTT" * 8, {}, genes)
    # b's codons, read backwards from 19, are a b c; where it overlaps a, the first one stands
    assert sequence.track == "." * 10 + "012012" + "acba" + "012" + "." * 17
    ((start, sample),) = sequence.pieces(12, 40)
    assert (start, sample["__key__"]) == (12, "s_1-000000012")
    assert sample["fa"] == f">s.1:12-40\n{('ACGTT' * 8)[12:]}\n" and sample["genes"] == sequence.track[12:]


def test_fluent_emoji_joins_names_and_keeps_skin_tones_of_a_concept_together(built):
    found = samples(built(fluent_emoji))
    assert set(found) == {"1/1f3c3", "1/1f3c3-1f3ff", "1/1f3f4-e0067", "1/2600", "4/33-fe0f-20e3", "4/1f3c3"}
    place, dark = found["1/1f3c3-1f3ff"]
    assert place == found["1/1f3c3"][0] == found["4/1f3c3"][0] == split_of("1f3c3")
    assert dark["txt"] == "person running" and dark["webp"] == webp(3)
    assert dark["json"] == {
        "concept": "1f3c3", "package": "@lobehub/fluent-emoji-anim-1", "frames": 3, "tags": ["run"],
        "label": "person running: dark skin tone", "concept_label": "person running", "group": "people-body",
    }  # fmt: skip
    assert [found[key][0] for key in ("1/1f3f4-e0067", "4/33-fe0f-20e3")] == ["stills", "stills"]
    assert [found[key][1]["txt"] for key in ("1/1f3f4-e0067", "4/33-fe0f-20e3", "1/2600")] == [
        "flag: Wales", "keycap: 3", "sun",
    ]  # fmt: skip


def test_tuxpaint_stamps_have_all_their_names_and_voices_and_share_a_split_by_english_name(built):
    found = samples(built(tuxpaint_stamps))
    place, duck = found["animals/duck"]
    voices = {f"{lang}.ogg" for lang in (*tuxpaint_stamps.LARGE, "en", "de")}
    assert set(duck) == {"png", "txt", "json", "effect.ogg", *voices}
    assert (duck["png"], duck["txt"], duck["fr.ogg"], duck["effect.ogg"]) == (png(), "A duck.", b"fr", b"quack")
    names = {"en": "A duck.", "fr": "Un canard.", "ca@valencia": "Un ànec."}
    assert duck["json"] == {"name": "a duck.", "folder": "animals", "names": names}
    other, pear = found["food/pear"]
    assert place == other == split_of("a duck."), "the same name in another case"
    assert pixels(pear["png"]).shape == (72, 144, 4) and set(pear) == {"png", "txt", "json", "pt_br.wav"}
    spoken = {key: one for key, (where, one) in found.items() if where == f"speech-{place}"}
    assert set(spoken) == {"fr/animals/duck", "en/animals/duck", "pt_br/food/pear"}, "what has no text is no pair"
    assert spoken["fr/animals/duck"]["txt"] == "Un canard." and spoken["fr/animals/duck"]["ogg"] == b"fr"
    assert spoken["pt_br/food/pear"]["json"] == {"language": "pt_BR", "english": "a duck.", "picture": "food/pear"}
    assert len(found) == 5


def test_fillets_joins_lines_by_level_and_keeps_levels_whole(built):
    found = samples(built(fillets))
    for number, level in enumerate(LEVELS):
        for lang, text in (("cs", f"Řekni {number}."), ("nl", f"Zeg {number}.")):
            place, one = found[f"{lang}/{level}/k"]
            assert place == split_of(level) and one["txt"] == text
            texts = {"cs": f"Řekni {number}.", "nl": f"Zeg {number}.", "de": f"Sag {number}."}
            assert one["json"] == {"language": lang, "level": level, "speaker": "small", "seconds": 0.1,
                                   "english": f'Say "{number}".', "texts": texts}  # fmt: skip
            assert (f"{lang}/{level}/u" in found) == (split_of(level) == "train")
    assert all("txt" not in one for place, one in found.values() if place == "unlabelled")
    (speakers,) = (task for task in card(built(fillets))["tasks"] if task["target"] == "json:speaker")
    assert speakers["labels"] == ["small", "big"], "others speak too"


def test_openclipart_leaves_out_copies_icons_large_ones_and_what_says_nothing(built):
    found = samples(built(openclipart))
    assert set(found) == {f"animals/a_{i}" for i in range(6)} | {"food/again"}
    place, one = found["animals/a_0"]
    assert one["txt"] == "Cat & 0" and one["json"] == {"title": "cat & 0", "keywords": ["cat", "pet"],
                                                       "folder": "animals"}  # fmt: skip
    assert place == found["food/again"][0] == split_of("cat & 0")
    assert pixels(one["png"]).shape == (72, 144, 4)


def test_a_card_counts_by_name_in_the_order_of_the_names(tmp_path, monkeypatch):
    for module in (openclipart, tuxpaint_stamps):
        monkeypatch.setattr(module, "split_of", lambda name: name[-1])
    drawings = openclipart.build(tmp_path / "drawings", source=MAKERS[openclipart](tmp_path))
    files = {f"{i}.png": png() for i in range(6)} | {f"{i}.txt": f"Thing {i}" for i in range(6)}
    source = fake.deb(
        tmp_path, "tuxpaint-stamps-default", {f"{tuxpaint_stamps.FOLDER}/a/{k}": v for k, v in files.items()}
    )
    pictures = tuxpaint_stamps.build(tmp_path / "pictures", source=source)
    assert list(card(drawings)["titles"]) == list(card(pictures)["names"]) == list("012345")


def arrow():
    """A thing with a head: its upper half is red."""
    image = Image.new("RGBA", (40, 40), (0, 0, 255, 255))
    ImageDraw.Draw(image).rectangle([0, 0, 39, 19], fill=(255, 0, 0, 255))
    return Concept("A", "arrow", "shape", image)


def red_at(motion):
    """Where the head is at the first, middle and last moment, and the size of the whole thing."""
    told = []
    for t in (0, 0.25, 1):
        image = Image.new("RGB", (96, 96), "white")
        moving.Thing(arrow(), motion, (0.0, 0.0, 96.0, 96.0)).draw(image, t)
        pixels_HW3 = np.asarray(image).astype(int)
        y, x = np.nonzero((pixels_HW3[..., 0] > 200) & (pixels_HW3[..., 2] < 60))
        told.append((x.mean() - 47.5, y.mean() - 47.5, (pixels_HW3.sum(-1) < 700).sum()))
    return told


def test_things_move_as_their_captions_say():
    first, _, last = red_at("moves left quickly")
    assert first[0] - last[0] > 30 and abs(first[1] - last[1]) < 1
    slow = red_at("moves left slowly")
    assert 8 < slow[0][0] - slow[-1][0] < 20
    first, _, last = red_at("moves down quickly")
    assert last[1] - first[1] > 30 and abs(first[0] - last[0]) < 1
    sizes = [size for _, _, size in red_at("grows")]
    assert sizes[0] < sizes[1] < sizes[2] and sizes[2] > 5 * sizes[0]
    assert [size for _, _, size in red_at("shrinks")][::2] == sizes[::-2]
    start, quarter, end = red_at("turns clockwise")
    assert start[1] < -10 and quarter[0] > 10 and end[1] < -10, "up, then right, then up again"
    assert red_at("turns anticlockwise")[1][0] < -10


def test_moving_clips_have_all_frames_and_come_out_the_same_twice(tmp_path):
    small = dict(concepts=12, unseen=6, train=30, valid=6, test=6, size_px=64)
    told = card(moving.build(tmp_path / "a", **small))
    assert card(moving.build(tmp_path / "b", **small)) == told
    found = samples(tmp_path / "a")
    keys = {}
    for key, (place, one) in found.items():
        with Image.open(io.BytesIO(one["webp"])) as clip:
            assert (clip.n_frames, clip.size) == (16, (64, 64)), key
        said = [f"{thing['name']} {thing['motion']}" for thing in one["json"]["things"]]
        assert one["txt"] == " and ".join(said) and len(said) in (1, 2)
        keys.setdefault(place, []).append(" + ".join(sorted(said)))
    assert {place: len(some) for place, some in keys.items()} == told["counts"]
    assert all(split_of(key) == place for place, some in keys.items() if place != "test-unseen" for key in some)
    assert len(set(keys["test"])) == 6
    seen = {one["name"] for one in told["concepts"]["seen"]}
    assert not any(name in key for key in keys["test-unseen"] for name in seen)


def test_an_interrupted_build_leaves_nothing_under_its_name_and_the_next_one_succeeds(tmp_path, monkeypatch):
    source = MAKERS[openmoji_pictures](tmp_path)

    def interrupted(svg, side_px):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(openmoji_pictures, "draw_png", interrupted)
        openmoji_pictures.build(tmp_path / "out", source=source)
    assert not (tmp_path / "out").exists()
    openmoji_pictures.build(tmp_path / "out", source=source)
    assert (tmp_path / "out" / "card.json").exists() and not list(tmp_path.glob(".*"))


def test_windows_of_a_chromosome_have_as_many_of_each_class_and_stay_in_their_part():
    bases = np.full(21_000_000, ord("A"), dtype=np.uint8)

    def put(at, text):
        bases[at : at + len(text)] = np.frombuffer(text.encode(), dtype=np.uint8)

    for at in (2_000_500, 5_800_000):
        put(at + 300, "GT")  # where the first coding part ends
        put(at + 2_000, "GTACGT")
    genes = tuple(Gene(str(at), "+", ((at, at + 300), (at + 900, at + 1_200))) for at in (2_000_500, 5_800_000))
    labelled = Sequence("chr2R", bases.tobytes().decode(), {}, genes)
    found = {}
    for place, sample in augustus.windows(labelled):
        at = int(sample["__key__"].rpartition("-")[2])
        found.setdefault(place, []).append((at, sample["cls"], sample["fa"].splitlines()[1]))
    kinds = ("coding-64", "coding-128", "donor")
    assert sorted(found) == sorted(f"{kind}-{split}" for kind in kinds for split in ("train", "valid"))
    for place, some in found.items():
        labels = [label for _, label, _ in some]
        assert labels.count("1") == labels.count("0") > 0
        size, (start, end) = len(some[0][2]), (2_000_000, 5_500_000) if "train" in place else (5_500_000, 6_000_000)
        for at, label, text in some:
            assert start <= at and at + len(text) <= end and len(text) == size
            coding = sum(gene_start < at + size and at < gene_end for g in genes for gene_start, gene_end in g.parts)
            if place.startswith("donor"):
                assert text[20:22] == "GT" and (label == "1") == (at + 20 in {2_000_800, 5_800_300})
            else:
                assert (label == "1") == bool(coding)


def test_emoji_clips_can_be_made_smaller():
    with Image.open(io.BytesIO(fluent_emoji.smaller(webp(5), 4, 3))) as picture:
        assert (picture.size, picture.n_frames, picture.format) == ((4, 4), 3, "WEBP")
