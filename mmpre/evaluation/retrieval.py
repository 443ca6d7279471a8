"""Retrieval by a network that scores pairs: every text against every picture of a held-out pool."""
# P pool size

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mmpre.attention import Attend, Full
from mmpre.batch import Batch, Row, pack
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.evaluation.results import NotMeasured, Result, mean
from mmpre.evaluation.rows import readable
from mmpre.evaluation.search import Found
from mmpre.masking.protocol import untouched
from mmpre.modality import Reader
from mmpre.processes.processes import Processes
from mmpre.tokens import Tokens

CHUNK_TOKENS = 16_384


@dataclass(frozen=True)
class PairRetrieval:
    """Rank all items for each query, and all queries for each item, by a score of the pair (zero-shot).

    `score(batch)` gives one number a row, higher for a better match. Pairs are made of the first `rows` units. Where
    it takes long to embed an item, `between(batch)` embeds a batch of all rows once, and the function that it returns
    scores pairs of them, given the numbers of the items' rows and of the queries'. `attend` says who sees whom in a
    row: what the network's own `attend` says, where that is not Full.
    """

    score: Callable[[Batch], Float[Tensor, "B"]] | None
    readers: Mapping[str, Reader]
    query: str = "text"
    item: str = "image"
    rows: int = 100
    name: str = "retrieval"
    between: Callable[[Batch], Callable[[Tensor, Tensor], Float[Tensor, "P"]]] | None = None
    attend: Attend = field(default_factory=Full)

    def run(self, units: Units, processes: Processes) -> Sequence[Result]:
        samples = readable(units, self.rows, self.readers)
        if len(samples) < 2:
            raise NotMeasured(f"{self.name}: wanted two rows that can be read, got {len(samples)}")
        count, score_PP = len(samples), self.scores(samples, processes).numpy()
        results = []
        for way, scores in ((f"{self.query} to {self.item}", score_PP), (f"{self.item} to {self.query}", score_PP.T)):
            found = Found.by(scores, np.eye(count, dtype=bool))
            for k in (1, 5, 10):
                if k < count:
                    results.append(mean(f"{self.name} {way} R@{k}", found.within(k), chance=k / count))
            results.append(mean(f"{self.name} {way} mean rank", found.rank_Q + 1, chance=(count + 1) / 2, less=True))
        return results

    @torch.no_grad()
    def scores(self, samples: Sequence, processes: Processes) -> Float[Tensor, "P P"]:
        """The score of every query (rows) with every item (columns)."""
        draws = [Draw.row(0, 0, 0, epoch=0, unit=i) for i in range(len(samples))]
        made = {
            role: [self.readers[role].tokenize(sample, draw) for sample, draw in zip(samples, draws, strict=True)]
            for role in (self.query, self.item)
        }
        score_PP = torch.empty(len(samples), len(samples))
        longest = max(len(tokens) for one in made.values() for tokens in one) * 2
        chunk = max(1, CHUNK_TOKENS // longest)
        pairs = [(i, j) for i in range(len(samples)) for j in range(len(samples))]
        if self.between is not None:
            own = zip(made[self.query], made[self.item], strict=True)
            whole = [self._row(f"{i}", query, item) for i, (query, item) in enumerate(own)]
            batch = pack(whole, self.attend.plan).to(processes.device)
            row_of_P, score = batch.order_B.cpu().argsort(), self.between(batch)
            for start in range(0, len(pairs), chunk):
                i_P, j_P = torch.tensor(pairs[start : start + chunk]).unbind(1)
                score_PP[i_P, j_P] = score(row_of_P[j_P], row_of_P[i_P]).float().cpu()
            return score_PP
        for start in range(0, len(pairs), chunk):
            some = pairs[start : start + chunk]
            rows = [self._row(f"{i} {j}", made[self.query][i], made[self.item][j]) for i, j in some]
            batch = pack(rows, self.attend.plan).to(processes.device)
            at = torch.tensor([[int(n) for n in key.split()] for key in batch.keys])
            score_PP[at[:, 0], at[:, 1]] = self.score(batch).float().cpu()
        return score_PP

    def _row(self, key: str, query: Tokens, item: Tokens) -> Row:
        roles = {self.query: query, self.item: item}
        roles = {role: roles[role] for role in self.readers if role in roles}
        return Row(key, roles, roles, {role: untouched(tokens).replaced_N for role, tokens in roles.items()}, {})
