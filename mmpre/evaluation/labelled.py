"""How often is a row's label, such as the answer to a question, told right?"""
# B rows, A labels

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mmpre.batch import Batch, pack
from mmpre.data.units import Units
from mmpre.evaluation.results import Result, mean
from mmpre.evaluation.rows import made_rows
from mmpre.labels import NONE
from mmpre.modality import Reader
from mmpre.processes.processes import Processes
from mmpre.view import View

CHUNK_ROWS = 32  # encoded at a time


@dataclass(frozen=True)
class Labelled:
    """The share of the rows with a label whose best score, by `score(batch)`, is that of their own, among the first
    `rows` units as `view` makes them. Chance is to name the commonest label. Data without any gives no result."""

    score: Callable[[Batch], Float[Tensor, "B A"]]
    view: View
    readers: Mapping[str, Reader]
    label: str
    name: str
    rows: int = 1_000

    @torch.no_grad()
    def run(self, units: Units, processes: Processes) -> Sequence[Result]:
        made = made_rows(self.view, self.readers, units, self.rows)
        rows = [row for row, _ in made if row.labels[self.label] != NONE]
        right, labels = [], Counter(int(row.labels[self.label]) for row in rows)
        for start in range(0, len(rows), CHUNK_ROWS):
            batch = pack(rows[start : start + CHUNK_ROWS], self.view.attend.plan).to(processes.device)
            right += (self.score(batch).argmax(1) == batch.labels[self.label]).float().tolist()
        return [mean(self.name, right, chance=max(labels.values()) / labels.total())] if rows else []
