"""A run's network beside rows that it can be shown: held-out ones where the run has them."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mmpre.batch import Batch, Row, pack
from mmpre.data.mixture import sources
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import CorruptSample
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.evaluation.cards import CARD, card_beside
from mmpre.modality import Reader
from mmpre.network import Network
from mmpre.processes.processes import Processes
from mmpre.recipe import Recipe, Stage, Task
from mmpre.runs.record_check import RunError
from mmpre.runs.run import load, open_units
from mmpre.strict_json import JSONError
from mmpre.strict_json import read as read_json
from mmpre.view import View

log = logging.getLogger(__name__)
MAX_CARD_BYTES = 16 << 20


@dataclass(frozen=True)
class Shown:
    """A row that is shown, and the sample it was made of."""

    sample: Sample
    row: Row
    draw: Draw


@dataclass(frozen=True)
class Opened:
    """A run's recipe with its weights, in evaluation mode, and units of a stage's data, by default of the last one's.

    `tasks` are those of the stage that are shown.
    """

    recipe: Recipe
    units: Units
    urls: Sequence[str]
    held_out: bool
    step: int
    processes: Processes
    tasks: Sequence[Task]

    @cached_property
    def network(self) -> Network | None:
        """What the recipe calls its network, or the first one within it that reads whole rows; None where none does."""
        return next((part for part in self.recipe.network.modules() if isinstance(part, Network)), None)

    @cached_property
    def card_folder(self) -> Path | None:
        """Where the card of the data set is that the shards lie in."""
        return card_beside(tuple(self.urls))

    @cached_property
    def card(self) -> Mapping[str, Any]:
        """That card; empty where there is none that can be read."""
        try:
            card = read_json(self.card_folder / CARD, max_bytes=MAX_CARD_BYTES) if self.card_folder else {}
        except (OSError, JSONError):
            card = {}
        return card if isinstance(card, dict) else {}

    def samples(self, wanted: int) -> Iterator[tuple[int, Sample]]:
        """Units spread evenly over the data, and their numbers; those that cannot be read are passed over."""
        for unit in np.linspace(0, len(self.units) - 1, min(wanted, len(self.units))).round().astype(int).tolist():
            try:
                yield unit, self.units.sample(unit)
            except (BadMember, CorruptSample):
                continue

    def rows(self, view: View, readers: Mapping[str, Reader], wanted: int) -> Iterator[Shown]:
        """Rows as a view makes them."""
        for unit, sample in self.samples(wanted):
            draw = Draw.row(0, 0, 0, epoch=0, unit=unit)
            try:
                yield Shown(sample, view.row(sample, readers, draw, self._donor(unit)), draw)
            except (BadMember, CorruptSample):
                continue

    def batch(self, rows: Sequence[Row], view: View | None = None) -> Batch:
        """Rows laid end to end, on the device. Their keys become their numbers: packing sorts them."""
        numbered = [replace(row, key=str(i)) for i, row in enumerate(rows)]
        return pack(numbered, (view or View()).attend.plan).to(self.processes.device)

    def _donor(self, unit: int):
        return lambda role, k: self.units.sample((unit + k + 1) % len(self.units))


def open_run(path: Path, data: Sequence[str] = (), sidecar: str | None = None) -> Opened:
    """A run's newest weights, and some shards: its held-out ones, or else those it trains on.

    Raises RunError where there are no shards.
    """
    opened, processes = load(path), Processes.start()
    recipe = opened.recipe
    recipe.module().to(processes.device).eval()
    stage = recipe.stages[-1]
    units, urls = _units(stage, data, sidecar)
    held_out = bool(data or stage.valid)
    return Opened(recipe, units, urls, held_out, opened.checkpoint.step, processes, stage.tasks)


def earlier(opened: Opened, data: Sequence[str] = (), sidecar: str | None = None) -> Iterator[tuple[int, Opened]]:
    """Each stage before the last one, the latest first, that has tasks which no later one has (by their names): its
    number, counted from 1, and itself with these tasks and rows of its data. A stage whose rows cannot be read is left
    out."""
    seen = {task.name for task in opened.tasks}
    for number, stage in reversed(list(enumerate(opened.recipe.stages[:-1], 1))):
        tasks = [task for task in stage.tasks if task.name not in seen]
        seen |= {task.name for task in tasks}
        if tasks:
            try:
                units, urls = _units(stage, data, sidecar)
            except RunError as e:
                log.warning("stage %d is not shown: %s", number, e)
                continue
            yield number, replace(opened, units=units, urls=urls, held_out=bool(data or stage.valid), tasks=tasks)


def _units(stage: Stage, data: Sequence[str], sidecar: str | None) -> tuple[Units, tuple[str, ...]]:
    """Units of some shards, and these: those that are named, or the stage's held-out ones, or those it trains on."""
    urls, sidecar = (tuple(data), sidecar) if data else (tuple(stage.valid), stage.valid_sidecar)
    if not urls:
        found = sources(stage.data, stage.sidecar)
        first = next(iter(found.values()), None)
        if first is None:
            raise RunError("the run names no shards, so nothing can be shown to its network; name some by --data")
        urls, sidecar = tuple(first.data), first.sidecar
    try:
        return open_units(stage, urls, sidecar), urls
    except (ValueError, OSError) as e:
        raise RunError(f"its rows cannot be read: {e}; name other shards by --data") from e


def modality_of(module: nn.Module, role: str) -> nn.Module | None:
    """The modality that embeds a role in an objective or network."""
    for part in module.modules():
        modalities = getattr(part, "modalities", None)
        if isinstance(modalities, nn.ModuleDict) and role in modalities:
            return modalities[role]
    return None
