"""The tasks that a data set's card names, and the samples and answers that they go by."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mmpre.data.index import open_shards
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import CorruptSample, ShardReader
from mmpre.data.units import Units
from mmpre.draw import hashed
from mmpre.strict_json import JSONError
from mmpre.strict_json import read as read_json

CARD = "card.json"
UNTAUGHT = ("zero-shot", "similarity", "minimal pairs")  # kinds that nothing is fitted for


class CardError(ValueError):
    """A card that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class CardTask:
    """A task of a card (data_tools/card.py says what its fields mean), and the folder and name of its set.

    `valid` is the split that hyper-parameters are chosen on. Splits are folders beside the card, or those of another
    set that was built beside it ("../other/train"). `labels` limits the samples to those with one of these targets.
    `other` is the second side of a pair, `prompts` are texts that name a class at {}, `epochs` how
    often a network that is trained on the labels sees them.
    """

    folder: Path
    set: str
    kind: str
    about: str
    input: str
    target: str
    group: str | None = None
    split: str = "test"
    train: str = "train"
    valid: str = "valid"
    baseline: str | None = None
    labels: tuple[str, ...] = ()
    other: str | None = None
    prompts: tuple[str, ...] = ("{}",)
    epochs: int = 3
    names: tuple[str, ...] = ()  # of the classes, where targets are their numbers

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


def read_card(folder: Path, kinds: tuple[str, ...]) -> list[CardTask]:
    """The tasks of `folder`/card.json. Raises CardError for one whose kind or fields are not known."""
    try:
        card = read_json(folder / CARD)
        told, name = card["tasks"], card["name"]
    except (JSONError, OSError, KeyError, TypeError) as e:
        raise CardError(f"{folder / CARD} names no tasks ({e!r}); build the data set again, or add them") from None
    known = {one.name for one in fields(CardTask)} - {"folder", "set", "names"}
    tasks = []
    for number, one in enumerate(told):
        kind = one.get("kind") if isinstance(one, dict) else None
        if kind not in kinds:
            near = difflib.get_close_matches(str(kind), kinds, 1)
            raise CardError(
                f"{folder / CARD}: task {number} is of kind {kind!r}; wanted one of {', '.join(kinds)}"
                + (f". Is it {near[0]}?" if near else "")
            )
        if unknown := set(one) - known:
            raise CardError(f"{folder / CARD}: task {number} has {', '.join(sorted(unknown))}; known: {sorted(known)}")
        if not isinstance(epochs := one.get("epochs", 1), int) or epochs < 1:
            raise CardError(f"{folder / CARD}: task {number}: epochs must be a whole number above 0, got {epochs!r}")
        names = tuple(card.get("classes", ())) if one.get("target") == "cls" else ()
        listed = {field: tuple(one[field]) for field in ("labels", "prompts") if field in one}
        tasks.append(CardTask(folder=folder, set=name, names=names, **one | listed))
    return tasks


def card_beside(urls: tuple[str, ...]) -> Path | None:
    """The folder with a card that some shards lie in, where there is one."""
    for url in urls:
        path = Path(str(url).rpartition("=")[2])
        for folder in (path, *path.parents[:2]):
            if (folder / CARD).is_file():
                return folder
    return None
