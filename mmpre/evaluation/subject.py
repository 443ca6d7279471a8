"""What every kind of task goes by: the network that is measured, and the rows of a card's task."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from mmpre.evaluation.cards import CardTask, as_member
from mmpre.evaluation.features import Vectors, pooled, role_of, towered
from mmpre.evaluation.probe import Known
from mmpre.evaluation.results import NotMeasured
from mmpre.network import Network
from mmpre.recipe import Recipe

TRAIN_ROWS, VALID_ROWS, TEST_ROWS = 20_000, 2_000, 10_000  # at most, drawn alike for every network


@dataclass
class Subject:
    """A network that is measured. Vectors of a split are made once. Members are as a card's tasks name them."""

    recipe: Recipe
    kept: dict[tuple, Vectors] = field(default_factory=dict)

    @property
    def network(self) -> nn.Module:
        return self.recipe.network

    def reads(self, member: str) -> bool:
        """Whether a reader finds a member in samples as they are."""
        return isinstance(self.network, Network) and role_of(self.network.readers, member) is not None

    def alike(self, member: str, other: str) -> bool:
        """Whether both members are read by one role, so that their states lie in one space."""
        readers = self.network.readers if isinstance(self.network, Network) else {}
        role = role_of(readers, as_member(member))
        return member == other or (role is not None and role == role_of(readers, as_member(other)))

    @property
    def suffixes(self) -> list[str]:
        """What the network and the towers read, as in ".png"."""
        readers = list(self.network.readers.values()) if isinstance(self.network, Network) else []
        readers += [reader for tower in self.recipe.towers.values() for reader in tower.net.readers.values()]
        return list(dict.fromkeys(f".{suffix}" for reader in readers for suffix in reader.suffixes))

    def tower(self, member: str) -> tuple[str, nn.Module] | None:
        """The role and the tower that read a member."""
        for role, tower in self.recipe.towers.items():
            if role_of({role: tower.net.readers[role]}, as_member(member)):
                return role, tower
        return None

    def means(self, task: CardTask, split: str, most: int, member: str) -> Vectors:
        key = (task.folder / split, member, most, task.period)
        if key not in self.kept:
            samples = task.sides(split, most, member)
            self.kept[key] = pooled(self.network, as_member(member), samples, period=task.period)
        return self.kept[key]

    def in_common(self, task: CardTask, split: str, most: int, member: str) -> Vectors:
        """Vectors in the space that the towers share."""
        role, tower = self.tower(member)
        key = (task.folder / split, member, most, role)
        if key not in self.kept:
            self.kept[key] = towered(tower, role, as_member(member), task.sides(split, most, member))
        return self.kept[key]


def known_of(task: CardTask, split: str, most: int, number_S: np.ndarray, layers: Sequence[Any]) -> Known:
    """Vectors and targets of the samples that have both."""
    found: dict[int, tuple[Any, Any]] = {}
    for number, sample in task.samples(split, most):
        value = task.field(sample, task.target)
        if value is not None:
            label = task.number(sample, value) if task.kind == "regression" else str(value)
            found[number] = (label, task.field(sample, task.group) if task.group else None)
    rows = np.array([row for row, number in enumerate(number_S.tolist()) if number in found], dtype=np.int64)
    values = [found[number_S[row]] for row in rows]
    y_S = np.array([label for label, _ in values])
    groups = np.array([str(one) for _, one in values]) if task.group else None
    return Known([one[rows] for one in layers], y_S, groups)


def title(task: CardTask) -> str:
    return f"{task.set}: {task.about}"


def valid_of(task: CardTask) -> str:
    """The split that choices are made on. Raises NotMeasured where there is none."""
    if not (task.folder / task.valid).is_dir():
        raise NotMeasured(
            f"no {task.valid} beside {task.folder}, which layer and strength could be chosen on; build that split, or "
            "name another one as the task's valid"
        )
    return task.valid
