"""A run's network beside rows that it can be shown: held-out ones where the run has them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mmpre.data.mixture import sources
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import CorruptSample
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.evaluation.cards import CARD, card_beside
from mmpre.modality import Reader
from mmpre.network import Network
from mmpre.processes import Processes
from mmpre.recipe import Recipe, Stage
from mmpre.record_check import RunError
from mmpre.run import load, open_units
from mmpre.strict_json import JSONError
from mmpre.strict_json import read as read_json
from mmpre.tokens import Batch, Row, pack
from mmpre.view import View

MAX_CARD_BYTES = 16 << 20


@dataclass(frozen=True)
class Shown:
    """A row that is shown, and the sample it was made of."""

    sample: Sample
    row: Row
    draw: Draw


@dataclass(frozen=True)
class Opened:
    """A run's recipe with its weights, in evaluation mode, and units of its last stage's data."""

    recipe: Recipe
    units: Units
    urls: Sequence[str]
    held_out: bool
    step: int
    processes: Processes

    @property
    def stage(self) -> Stage:
        return self.recipe.stages[-1]

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
    held_out = bool(data or stage.valid)
    urls, sidecar = (tuple(data), sidecar) if data else (tuple(stage.valid), stage.valid_sidecar)
    if not urls:
        found = sources(stage.data, stage.sidecar)
        first = next(iter(found.values()), None)
        if first is None:
            raise RunError(f"{path} names no shards, so nothing can be shown to its network")
        urls, sidecar = tuple(first.data), first.sidecar
    try:
        units = open_units(stage, urls, sidecar)
    except (ValueError, OSError) as e:
        raise RunError(f"its rows cannot be read: {e}; name other shards by --data") from e
    return Opened(recipe, units, urls, held_out, opened.checkpoint.step, processes)


def modality_of(module: nn.Module, role: str) -> nn.Module | None:
    """The modality that embeds a role in an objective or network."""
    for part in module.modules():
        modalities = getattr(part, "modalities", None)
        if isinstance(modalities, nn.ModuleDict) and role in modalities:
            return modalities[role]
    return None
