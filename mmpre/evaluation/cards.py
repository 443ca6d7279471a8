"""The tasks that a data set's card names, and the samples and answers that they go by."""

import difflib
import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmpre.data.index import open_shards
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import CorruptSample, ShardReader
from mmpre.data.units import Units
from mmpre.draw import hashed
from mmpre.evaluation.results import NotMeasured
from mmpre.evaluation.task import EvalTask
from mmpre.strict_json import JSONError
from mmpre.strict_json import read as read_json

CARD = "card.json"
COUNTS = ("epochs", "period")  # fields that are whole numbers
UNTAUGHT = ("zero-shot", "similarity", "minimal pairs")  # kinds that nothing is fitted for


class CardError(ValueError):
    """A card that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class CardTask(EvalTask):
    """A task of a card that was read, with the folder and the name of its set.

    Splits are folders beside the card. `names` are those of the classes, where targets are their numbers.
    """

    folder: Path
    set: str
    names: tuple[str, ...] = ()

    def samples(self, split: str, most: int | None = None) -> Iterator[tuple[int, Sample]]:
        """Samples with their numbers, in order; at most `most`, drawn from the set's and the split's name alone."""
        path = self.folder / split
        units = Units(ShardReader(open_shards([path])))
        numbers = np.arange(len(units))
        if most is not None and len(units) > most:
            rng = np.random.default_rng(hashed("rows", self.set, split))
            numbers = np.sort(rng.choice(len(units), most, replace=False))
        for number in numbers.tolist():
            try:
                yield number, units.sample(number)
            except CorruptSample:
                continue

    def sides(self, split: str, most: int, where: str) -> Iterator[tuple[int, Sample]]:
        """The same, of `json:NAME` the text as a sample of its own; those that lack it are left out."""
        found = False
        for number, sample in self.samples(split, most):
            try:
                yield number, side(sample, where) if where.startswith("json:") else sample
                found = True
            except BadMember:
                continue
        if not found and where.startswith("json:"):
            raise NotMeasured(f"no sample of {split} has a text, or several, called {where.removeprefix('json:')}")

    def missing(self) -> str:
        """Which of its splits is not there, "" where all are."""
        wanted = (self.split,) if self.kind in UNTAUGHT else (self.split, self.train)
        gone = [split for split in wanted if not (self.folder / split).is_dir()]
        return f"no {' and '.join(gone)} beside {self.folder / CARD}; build that data set there" if gone else ""

    def field(self, sample: Sample, where: str) -> Any:
        """A sample's member as text, or what "json:name" names; None where it has none, or no wanted label."""
        try:
            kind, _, name = where.partition(":")
            value = sample.json().get(name) if kind == "json" and name else sample.text((where,)).strip()
        except (BadMember, AttributeError):
            return None
        if where == self.target and self.labels and str(value) not in self.labels:
            return None
        return value

    def number(self, sample: Sample, value: Any) -> float:
        """A target as a number. Raises NotMeasured for one that is none."""
        try:
            if math.isfinite(number := float(value)):
                return number
        except (TypeError, ValueError):
            pass
        raise NotMeasured(
            f"{self.kind}: wanted a number as {self.target} of sample {sample.key}, got {value!r:.60}; look at the "
            "task's target"
        )

    def name_of(self, label: str) -> str:
        """A class by its name, where the card has names. Raises NotMeasured for a number that no name stands for."""
        if not self.names:
            return label
        if not label.isdecimal() or int(label) >= len(self.names):
            raise NotMeasured(
                f"{self.kind}: wanted a number below {len(self.names)} as {self.target}, which the card's classes are "
                f"counted by, got {label!r:.60}; mend the labels, or the card's list of classes"
            )
        return self.names[int(label)]


def read_card(folder: Path, kinds: tuple[str, ...]) -> list[CardTask]:
    """The tasks of `folder`/card.json, if it names any.

    Raises CardError for a card that cannot be read, and for a task whose kind or fields are not known or not usable.
    """
    try:
        card = read_json(folder / CARD)
        told, name = card.get("tasks", []), card.get("name", folder.name)
    except (JSONError, OSError, AttributeError) as e:
        raise CardError(f"{folder / CARD} is no card ({e!r}); build the data set again, or mend it") from None
    if not isinstance(told, list) or not isinstance(name, str):
        raise CardError(f"{folder / CARD}: name must be a text and tasks a list, got {name!r:.40} and {told!r:.40}")
    tasks = []
    for number, one in enumerate(told):
        try:
            found = _usable(one, kinds)
            names = _texts(card, "classes") if found["target"] == "cls" and "classes" in card else ()
        except ValueError as e:
            raise CardError(f"{folder / CARD}: task {number} {e}") from None
        tasks.append(CardTask(folder=folder, set=name, names=names, **found))
    return tasks


def _usable(one: Any, kinds: tuple[str, ...]) -> dict[str, Any]:
    """A task's fields as CardTask takes them. Raises ValueError with what is wrong with it."""
    kind = one.get("kind") if isinstance(one, dict) else None
    if kind not in kinds:
        near = difflib.get_close_matches(str(kind), kinds, 1)
        wrong = f"is of kind {kind!r}; wanted one of {', '.join(kinds)}"
        raise ValueError(wrong + (f". Is it {near[0]}?" if near else ""))
    known = {field.name: field for field in fields(EvalTask)}
    if unknown := set(one) - set(known):
        raise ValueError(f"has {', '.join(sorted(unknown))}; known: {sorted(known)}")
    if lacking := [name for name, field in known.items() if field.default is MISSING and name not in one]:
        raise ValueError(f"has no {' and no '.join(lacking)}; add it")
    for name in COUNTS:
        if not isinstance(count := one.get(name, 1), int) or count < 1:
            raise ValueError(f"has {name} {count!r}; wanted a whole number above 0")
    listed = {name: _texts(one, name) for name in ("labels", "prompts") if name in one}
    if strange := [name for name in one if name not in (*COUNTS, *listed) and not isinstance(one[name], str)]:
        raise ValueError(f"has {strange[0]} {one[strange[0]]!r:.40}; wanted a text")
    return one | listed


def _texts(told: dict[str, Any], name: str) -> tuple[str, ...]:
    value = told[name]
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise ValueError(f'has {name} {value!r:.40}; wanted a list of texts, ["...", ...]')
    return tuple(value)


def card_beside(urls: tuple[str, ...]) -> Path | None:
    """The folder with a card that some shards lie in, where there is one."""
    for url in urls:
        path = Path(str(url).rpartition("=")[2])
        for folder in (path, *path.parents[:2]):
            if (folder / CARD).is_file():
                return folder
    return None


def as_member(where: str) -> str:
    """The member as which a reader gets it: a text for a field of the sample's JSON."""
    return "txt" if where.startswith("json:") else where


def member_of(where: str) -> str:
    """What reads a part of a sample: the same, and .png for .right.png."""
    return as_member(where).rpartition(".")[2]


def side(sample: Sample, where: str) -> Sample:
    """A part of a sample as a sample of its own; of a field with several texts, all of them. Raises BadMember where
    there is no such part."""
    if not where.startswith("json:"):
        return replace(sample, members={member_of(where): sample.bytes((where,))[1]})
    name, value = where.removeprefix("json:"), sample.json()
    value = value.get(name) if isinstance(value, dict) else None
    texts = value if isinstance(value, list) and value else [value]
    if not all(isinstance(text, str) for text in texts):
        raise BadMember("missing side", "json", f"wanted a text called {name}, got {value!r}")
    return replace(sample, members={"txt": ", ".join(texts).encode()})
