"""Each builder on a tiny package in the layout of the real one: what it takes, where it puts it, what it leaves out."""

import hashlib
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from small_sets import MAKERS, PROMPTS, make_animal_shapes, sound, webp

from mmpre.data.index import open_shards
from mmpre.data.shards import ShardReader
from mmpre.data_tools import (
    animal_shapes,
    asterisk,
    augustus,
    digits,
    fluent_emoji,
    openmoji_pictures,
    pyrodigal_genome,
    ragout,
    stdlib,
    wordnet,
)  # fmt: skip
from mmpre.data_tools.archives import ArchiveError
from mmpre.data_tools.genomes import PIECE, Gene, Sequence
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
    return content.decode() if kind in ("txt", "py", "cls", "dna", "genes") else content


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

    members = {suffix for _, sample in found.values() for suffix in sample}
    fields = {f"json:{name}" for _, sample in found.values() if "json" in sample for name in sample["json"]}
    for task in told["tasks"]:
        named = {task[name] for name in ("input", "target", "group") if name in task}
        assert all(name in members | fields or (out / name).exists() for name in named), named

    module.build(tmp_path / "again", source=built.source(module))
    again = card(tmp_path / "again")
    assert again == told
    for name, digest in told["sha256"].items():
        assert hashlib.sha256((tmp_path / "again" / name).read_bytes()).hexdigest() == digest


def test_stdlib_takes_documented_functions_of_middle_length_without_their_docstrings(built):
    found = samples(built(stdlib))
    assert {key.rpartition("-")[0] for key in found} == {"lib/__future__", "lib/a", "lib/b_c"}
    for module in ("__future__.py", "a.py", "b.c.py"):
        mine = {about["json"]["name"]: (place, about) for place, about in found.values()
                if about["json"]["module"] == module}  # fmt: skip
        assert set(mine) == {"method", "inner", "told"}
        assert {place for place, _ in mine.values()} == {split_of(module)}
        assert mine["method"][1]["txt"] == "Say what it is."
        assert mine["inner"][1]["py"] == 'def inner():\n    return "é" * x\n'
        assert mine["told"][1] == {
            "txt": "Three words suffice.", "py": "async def told(\n    a,\n): return a\n",
            "json": {"module": module, "name": "told", "line": 14, "lines": 3},
        }  # fmt: skip
        # the outer function keeps the docstring of the inner one, which is code of its own
        assert "Say what" not in mine["method"][1]["py"] and "Inner ones" in mine["method"][1]["py"]


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
        with pytest.raises(pickle.UnpicklingError, match=message):
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
    assert first["dna"][100:105] + first["dna"][205:209] == "ATGGCCTAA"
    assert first["genes"][98:107] == "..01201ii" and first["genes"][203:211] == "ii2012.."
    place, test = found["chr2R-006000000"]
    assert place == "test" and test["dna"][:10] == "tttTTACATt" and test["genes"][:10] == "...cbacba."
    splits = {split: [(one["json"]["start"], one["json"]["end"]) for place, one in found.values() if place == split]
              for split in ("train", "valid", "probe", "test")}  # fmt: skip
    assert sum(end - start for some in splits.values() for start, end in some) == 21_000_000
    assert not any(start < 7_000_000 and end > 2_000_000 for start, end in splits["train"] + splits["valid"])
    assert all("genes" not in one for place, one in found.values() if place == "train")
    told = card(built(augustus))
    assert (told["transcripts"], told["without_inner_stop"], told["beginning_with_ATG"]) == (2, 2, 2)


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
    assert one["dna"] == "A" * 10 and one["json"]["species"] == "Escherichia coli"
    assert found["V_Cholerae-C-2-000000000"][1]["dna"] == "ACG" * 50
    assert len(found) == 4 * 3 * 3


def test_the_genes_that_pyrodigal_finds_can_be_translated(tmp_path):
    out = pyrodigal_genome.build(tmp_path / "out")
    told, found = card(out), samples(out)
    assert (told["bases"], told["genes_found"], told["coding_share"]) == (2_463_666, 2_343, 0.886)
    order = sorted(found.values(), key=lambda one: one[1]["json"]["start"])
    bases, track = ("".join(one[member] for _, one in order) for member in ("dna", "genes"))
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


def test_overlapping_transcripts_and_pieces_keep_coordinates():
    genes = (Gene("a", "+", ((10, 16), (20, 23))), Gene("b", "-", ((14, 20),)))
    sequence = Sequence("s.1", "ACGTT" * 8, {}, genes)
    # b's codons, read backwards from 19, are a b c; where it overlaps a, the first one stands
    assert sequence.track == "." * 10 + "012012" + "acba" + "012" + "." * 17
    ((start, sample),) = sequence.pieces(12, 40)
    assert (start, sample["__key__"]) == (12, "s_1-000000012")
    assert sample["dna"] == ("ACGTT" * 8)[12:] and sample["genes"] == sequence.track[12:]


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
