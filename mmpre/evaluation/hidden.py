"""How many hidden tokens a network names rightly, on rows that are hidden alike for every network."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from mmpre.batch import Batch, pack
from mmpre.data.sample import BadMember
from mmpre.data.shards import CorruptSample
from mmpre.data.units import Units
from mmpre.draw import Draw, hashed
from mmpre.evaluation.markov import markov
from mmpre.evaluation.results import Result, mean
from mmpre.heads.vocabulary import Vocabulary
from mmpre.modality import still
from mmpre.network import Network
from mmpre.processes.processes import Processes
from mmpre.view import View

CHUNK_ROWS = 32  # encoded at a time


@dataclass(frozen=True)
class HiddenTokens:
    """The share of the tokens that the view picks whose likeliest id is their own, over `rows` units spread over the
    held-out ones; rows have equal weight. Chance is to name the commonest id of those asked for.

    What a row shows depends on its number alone, so that networks which learned by other masks are compared on the same
    rows, if they have readers alike. With `order`, what so many ids before tell, by counts, stands beside it.
    """

    network: Network
    head: Vocabulary
    view: View
    rows: int = 500
    name: str = "hidden tokens"
    order: int = 0

    @torch.no_grad()
    def run(self, units: Units, processes: Processes) -> Sequence[Result]:
        shares, ids, read, asked = [], Counter(), [], []
        for batch in self._batches(units):
            batch = batch.to(processes.device)
            (picked,) = batch.picked.values()
            place_M = batch.layout.at(picked.role, picked.seen_M)
            id_M = batch.clean[picked.role][self.head.field][picked.clean_M]
            right_M = self.head.scores(self.network(batch, at=place_M)).argmax(1) == id_M
            row_M = batch.layout.row_N[place_M]
            right_B, asked_B = (torch.bincount(row_M, x, len(batch.layout)) for x in (right_M.float(), None))
            shares += batch.given(right_B / asked_B.clamp(min=1)).tolist()
            ids.update(id_M.tolist())
            if self.order:
                clean = batch.clean[picked.role]
                read += [one.numpy() for one in clean[self.head.field].cpu().split(clean.lengths_B.tolist())]
                first_B = clean.lengths_B.cumsum(0) - clean.lengths_B
                inside_M = picked.clean_M.cpu() - first_B[batch.layout.row_N[place_M].cpu()]
                asked += [one.numpy() for one in inside_M.split(asked_B.tolist())]
        guess = max(ids.values()) / ids.total() if ids else None
        found = [mean(self.name, shares, chance=guess, protocol={"commonest of": len(ids)})]
        if self.order:
            told = {"counted in": f"the other {len(read) - 1} rows"}
            found.append(
                mean(
                    f"Markov model of order {self.order}", markov(read, asked, self.order), chance=guess, protocol=told
                )
            )
        return found

    def _batches(self, units: Units) -> Iterator[Batch]:
        rng = torch.Generator().manual_seed(hashed("hidden rows", self.name))
        readers = {role: still(one) for role, one in self.network.readers.items()}
        made = []
        for number in torch.randperm(len(units), generator=rng)[: self.rows].tolist():
            draw = Draw.row(0, 0, 0, epoch=0, unit=number)
            try:
                made.append(self.view.row(units.sample(number), readers, draw, lambda role, k: None))
            except (BadMember, CorruptSample):
                continue
            if len(made) == CHUNK_ROWS:
                yield pack(made, self.view.attend.plan)
                made = []
        if made:
            yield pack(made, self.view.attend.plan)
