"""How well hidden tokens are predicted, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mmpre.batch import pack
from mmpre.data.units import Units
from mmpre.evaluation.results import Result, mean
from mmpre.evaluation.rows import made_rows
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
