"""How a codebook is used on held-out units."""
# B units, K codes, n tokens of one row

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mmpre.codes import Coder, use
from mmpre.data.sample import BadMember
from mmpre.data.shards import CorruptSample
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.evaluation.results import Result
from mmpre.modality import Reader
from mmpre.processes import Processes
from mmpre.tokens import Row, pack
from mmpre.view import View

RESAMPLES = 200


@dataclass(frozen=True)
class CodebookUse:
    """Perplexity of the codes of the first `rows` units that can be read, and the share of all codes among them.

    The commonest code is often that of an empty ground, so perplexity is told without it as well. Chance is the
    perplexity of a single code. Intervals of perplexity are over units.
    """

    coder: Coder
    view: View
    rows: int = 200

    @torch.no_grad()
    def run(self, units: Units, processes: Processes) -> Sequence[Result]:
        counts = []
        for row in self._rows(units, self.coder.net.readers):
            batch = pack([row], self.view.attend.plan).to(processes.device)
            (clean,) = batch.clean.values()
            code_n = self.coder.codes(batch)[clean.special_N < 0]
            counts.append(torch.bincount(code_n, minlength=len(self.coder.book)).cpu())
        if not counts:
            raise ValueError("CodebookUse: no unit could be read; look at the data's holes")
        count_BK, of = torch.stack(counts), f"(of {len(self.coder.book)})"
        rest_BK = count_BK.clone()
        rest_BK[:, count_BK.sum(0).argmax()] = 0
        share = use(count_BK.sum(0))[1]
        return [
            _perplexity(f"codebook perplexity {of}", count_BK),
            _perplexity(f"the same without the commonest code {of}", rest_BK),
            Result(f"share of codes in use {of}", share, share, share, len(counts)),
        ]

    def _rows(self, units: Units, readers: Mapping[str, Reader]) -> Sequence[Row]:
        made = []
        for i in range(min(self.rows, len(units))):
            try:
                draw = Draw.row(0, 0, 0, epoch=0, unit=i)
                made.append(self.view.row(units.sample(i), readers, draw, lambda role, k: None))
            except (BadMember, CorruptSample):
                continue
        return made


def _perplexity(name: str, count_BK: Int[Tensor, "B K"]) -> Result:
    rng = torch.Generator().manual_seed(0)
    drawn = (torch.randint(len(count_BK), (len(count_BK),), generator=rng) for _ in range(RESAMPLES))
    low, high = torch.tensor([use(count_BK[row_B].sum(0))[0] for row_B in drawn]).quantile(torch.tensor([0.025, 0.975]))
    return Result(name, use(count_BK.sum(0))[0], low.item(), high.item(), len(count_BK), 1.0)
