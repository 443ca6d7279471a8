"""Which region is a hidden word read from? By hiding regions as well, and looking at what that costs."""
# W names in a caption, R regions, M picked tokens

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmpre.batch import Picked, Row, pack
from mmpre.data.sample import Sample
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.evaluation.grounding import named
from mmpre.evaluation.results import Result, mean
from mmpre.evaluation.rows import readable
from mmpre.heads.protocol import Head
from mmpre.modality import Reader
from mmpre.network import Network
from mmpre.processes.processes import Processes


@dataclass(frozen=True)
class Reading:
    """For each name in a caption, hidden: is the region whose hiding makes it least likely the one it names?

    Samples must tell which words name which region, as for `Grounding`. `head` is what predicts the caption's tokens.
    """

    network: Network
    head: Head
    readers: Mapping[str, Reader]
    text: str = "text"
    item: str = "image"
    rows: int = 100
    name: str = "hidden name read from its region"

    def run(self, units: Units, processes: Processes) -> Sequence[Result]:
        right, chances = [], []
        for sample in readable(units, self.rows, self.readers):
            named_W, cost_WR = self.costs(sample, processes)
            right += (cost_WR.argmax(1) == named_W).float().tolist()
            chances += [1 / cost_WR.shape[1]] * len(cost_WR)
        return [mean(self.name, right, chance=sum(chances) / max(len(chances), 1))]

    @torch.no_grad()
    def costs(self, sample: Sample, processes: Processes) -> tuple[Int[Tensor, "W"], Float[Tensor, "W R"]]:
        """The regions that names name, and by how much hiding each region raises the loss of each hidden name, in nats
        summed over the name's tokens.

        Names that the caption was cut before, and those of regions that are not read, are left out.
        """
        draw = Draw.row(0, 0, 0, epoch=0, unit=0)
        tokens = {role: self.readers[role].tokenize(sample, draw) for role in (self.text, self.item)}
        regions = len(tokens[self.item])
        found = enumerate(named(self.readers[self.text], sample, self.name)[:regions])
        names = {region: index for region, index in found if index}
        if not names:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, regions)
        rows = []
        for w, index in names.items():
            for region in (None, *range(regions)):
                replaced = {role: torch.zeros(len(one), dtype=torch.bool) for role, one in tokens.items()}
                replaced[self.text][index] = True
                if region is not None:
                    replaced[self.item][region] = True
                picked = Picked(self.text, torch.tensor(index), torch.tensor(index))
                rows.append(Row(f"{w} {region}", tokens, tokens, replaced, {"name": picked}))
        batch = pack(rows, self.network.attend.plan).to(processes.device)
        place_M = batch.layout.at(self.text, batch.picked["name"].seen_M)
        loss_M = self.head(
            self.network(batch, at=place_M), batch.clean[self.text], batch.picked["name"].clean_M
        ).float()
        loss_P = loss_M.new_zeros(len(rows)).index_add(0, batch.layout.row_N[place_M], loss_M)
        loss_WC = batch.given(loss_P).view(-1, regions + 1).cpu()
        return torch.tensor(list(names)), loss_WC[:, 1:] - loss_WC[:, :1]
