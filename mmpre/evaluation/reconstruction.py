"""How well hidden tokens are predicted, row by row."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mmpre.batch import Row, pack
from mmpre.data.sample import BadMember
from mmpre.data.shards import CorruptSample
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.evaluation.results import Result, mean
from mmpre.modality import Reader
from mmpre.objectives.protocol import Objective
from mmpre.processes.processes import Processes
from mmpre.view import View


@dataclass(frozen=True)
class Reconstruction:
    """The objective's loss of each of the first `rows` units that can be read, rows having equal weight.

    `flat`, where the objective measures it, is what a flat prediction (each patch's own mean) costs; it is told as
    what chance gives.
    """

    objective: Objective
    view: View
    rows: int = 200
    name: str = "error of hidden patches"

    @torch.no_grad()
    def run(self, units: Units, processes: Processes) -> Sequence[Result]:
        losses, flats = [], []
        for row, draw in made_rows(self.view, self.objective.readers, units, self.rows):
            batch = pack([row], self.view.attend.plan).to(processes.device)
            loss = self.objective(batch, draw)
            losses.append(loss.total(batch.counts).item())
            flats += [v.item() / batch.counts[per] for n, (v, per) in loss.metrics.items() if n.endswith("_flat")]
        return [mean(self.name, losses, chance=sum(flats) / len(flats) if flats else None, less=True)]


def made_rows(view: View, readers: Mapping[str, Reader], units: Units, most: int) -> Iterator[tuple[Row, Draw]]:
    """Rows of the first `most` units that can be read, alike for every network and seed."""
    for i in range(min(most, len(units))):
        draw = Draw.row(0, 0, 0, epoch=0, unit=i)
        try:
            yield view.row(units.sample(i), readers, draw, lambda role, k: None), draw
        except (BadMember, CorruptSample):
            continue
