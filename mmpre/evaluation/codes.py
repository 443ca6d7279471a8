"""How a codebook is used on held-out units."""
# B units, K codes, n tokens of one row, G groups of V codes

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mmpre.batch import Batch, pack
from mmpre.codes import Coder, use
from mmpre.data.sample import BadMember
from mmpre.data.shards import CorruptSample
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.evaluation.results import NotMeasured, Result, mean, statistic
from mmpre.gumbel import perplexity
from mmpre.modality import Reader
from mmpre.objectives.own_codes import OwnCodes
from mmpre.processes.processes import Processes
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
        for batch, _ in _batches(self.view, self.coder.net.readers, units, self.rows, processes):
            (clean,) = batch.clean.values()
            code_n = self.coder.codes(batch)[clean.special_N < 0]
            counts.append(torch.bincount(code_n, minlength=len(self.coder.book)).cpu())
        if not counts:
            raise NotMeasured("CodebookUse: no unit could be read; look at the data's holes")
        count_BK, of = torch.stack(counts), f"(of {len(self.coder.book)})"
        rest_BK = count_BK.clone()
        rest_BK[:, count_BK.sum(0).argmax()] = 0
        share = use(count_BK.sum(0))[1]
        return [
            _perplexity(f"codebook perplexity {of}", count_BK),
            _perplexity(f"the same without the commonest code {of}", rest_BK),
            Result(f"share of codes in use {of}", share, share, share, len(counts)),
        ]


@dataclass(frozen=True)
class OwnCodesUse:
    """How the codes of hidden tokens are used in the first `rows` units that can be read, and told by the network.

    Soft perplexity is that of the mean of what each code is thought worth, without chance, as a share of all codes; it
    falls towards 0 where a codebook collapses, and hidden codes are then easy to tell: look at both. Chance is what one
    code alone would give, and always naming the commonest code. Intervals are over units.
    """

    objective: OwnCodes
    view: View
    rows: int = 200

    @torch.no_grad()
    def run(self, units: Units, processes: Processes) -> Sequence[Result]:
        soft, counts, right, sizes = [], [], [], []
        for batch, draw in _batches(self.view, self.objective.readers, units, self.rows, processes):
            chosen, right_MG = self.objective.told(batch, draw)
            soft.append(chosen.share_MGV.sum(0).cpu())
            counts.append(chosen.choice_MGV.sum(0).cpu())
            sizes.append(len(chosen.code_MG))
            if right_MG is not None:
                right.append(right_MG.float().mean().item())
        if not sizes:
            raise NotMeasured("OwnCodesUse: no unit could be read; look at the data's holes")
        soft_BGV, count_BGV = torch.stack(soft), torch.stack(counts)
        of, groups = soft_BGV[0].numel(), soft_BGV.shape[1]
        columns = soft_BGV.numpy(), np.array(sizes)

        def share(soft_BGV: np.ndarray, size_B: np.ndarray) -> float:
            return perplexity(torch.from_numpy(soft_BGV.sum(0) / size_B.sum())).item() / of

        def hard(count_BGV: np.ndarray, size_B: np.ndarray) -> float:
            return perplexity(torch.from_numpy(count_BGV.sum(0) / size_B.sum())).item()

        commonest = (count_BGV.sum(0).amax(1) / sum(sizes)).mean().item()
        name, how = f"codebook soft perplexity, share of {of}", dict(resamples=RESAMPLES, centred=True)
        found = [
            statistic(name, share, *columns, chance=groups / of, **how),
            statistic(f"codebook perplexity (of {of})", hard, count_BGV.numpy(), columns[1], chance=float(groups),
                      **how),
        ]  # fmt: skip
        return [*found, mean("hidden token's code told", right, chance=commonest)] if right else found


def _batches(
    view: View, readers: Mapping[str, Reader], units: Units, rows: int, processes: Processes
) -> Iterator[tuple[Batch, Draw]]:
    """A batch of each of the first units that can be read."""
    for i in range(min(rows, len(units))):
        draw = Draw.row(0, 0, 0, epoch=0, unit=i)
        try:
            row = view.row(units.sample(i), readers, draw, lambda role, k: None)
        except (BadMember, CorruptSample):
            continue
        yield pack([row], view.attend.plan).to(processes.device), draw


def _perplexity(name: str, count_BK: Int[Tensor, "B K"]) -> Result:
    rng = torch.Generator().manual_seed(0)
    drawn = (torch.randint(len(count_BK), (len(count_BK),), generator=rng) for _ in range(RESAMPLES))
    low, high = torch.tensor([use(count_BK[row_B].sum(0))[0] for row_B in drawn]).quantile(torch.tensor([0.025, 0.975]))
    return Result(name, use(count_BK.sum(0))[0], low.item(), high.item(), len(count_BK), 1.0)
