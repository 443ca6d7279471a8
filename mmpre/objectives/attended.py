"""Hide what a network itself attends to most."""
# N tokens of the packed batch, M hidden ones, m those of one role, n tokens of one role, B rows

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from mmpre.absent import Absent
from mmpre.attention.backends import received
from mmpre.batch import Batch
from mmpre.draw import Draw
from mmpre.heads.guess import Guess
from mmpre.masking.on_device import hide
from mmpre.masking.protocol import Corruption
from mmpre.masking.weighted import draw_weighted
from mmpre.modality import Reader
from mmpre.objectives.loss import Loss, Term
from mmpre.objectives.one_pass import OnePass


class Attended(nn.Module):
    """In a share of the rows other tokens are hidden than the workers picked: those that a clean pass reads most.

    `rows` is the chance of a row to be one of these. Of its tokens, those of all roles together, int(`share` x their
    number) are drawn without replacement, each in proportion to the attention that it receives in all layers of a pass
    in which nothing is hidden, the mean over heads; special tokens never. `corruptions` hides them, by the name of the
    pick that they then belong to, one a role; other rows keep their picks, so the workers' view must hide these picks
    in the same way. The pass has no gradient, but the dropout of training.

    How many tokens of a role are hidden is known on the device alone. So a pick's terms and metrics are means over the
    micro-batch's picked tokens, averaged over micro-batches by their rows, and a device is waited for once for each
    pick. Source: attended masking of VIOLET, Fu et al. 2021, arXiv:2111.12681, in the authors' code.
    """

    def __init__(
        self, then: OnePass, corruptions: Mapping[str, Corruption], *, share: float = 0.15, rows: float = 0.5
    ) -> None:
        super().__init__()
        if not (0 < share < 1 and 0 <= rows <= 1):
            raise ValueError(
                f"Attended: share must lie between 0 and 1, rows in 0 to 1, got share {share} and rows {rows}; half of "
                "the rows are 0.5"
            )
        self.then, self.corruptions, self.share, self.rows = then, dict(corruptions), share, rows

    @property
    def readers(self) -> Mapping[str, Reader]:
        return self.then.readers

    def forward(self, batch: Batch, draw: Draw) -> Loss:
        hidden = self.hidden(batch, draw)
        loss, rows = self.then(hidden, draw), len(batch.layout)

        def by_rows(value: Tensor, per: str) -> tuple[Tensor, str]:
            name = per.removeprefix("picked:")
            if name not in self.corruptions:
                return value, per
            return value * (rows / max(1, len(hidden.picked[name]))), "rows"

        terms = [Term(one.name, *by_rows(one.sum, one.per), one.weight) for one in loss.terms]
        metrics = {name: by_rows(*one) for name, one in loss.metrics.items()}
        for name in self.corruptions:
            metrics[f"{name}_hidden"] = torch.tensor(float(len(hidden.picked[name]))), "tokens"
        return Loss(terms, metrics)

    @torch.no_grad()
    def hidden(self, batch: Batch, draw: Draw) -> Batch:
        """The batch that is learned from."""
        if missing := sorted(set(self.corruptions) - set(batch.picked)):
            raise Absent(f"Attended: no pick {', '.join(missing)} in the batch, it has {sorted(batch.picked)}")
        layout, net = batch.layout, self.then.net
        chosen_B = torch.rand(len(layout), generator=draw.rng("rows")) < self.rows
        with received() as read:
            net.encode(net.embed(batch, clean=True), layout, batch.plan)
        if len({len(one) for one in read}) > 1:
            raise ValueError("Attended: wanted layers that all read the same tokens, got some that read a role alone")
        special_N = torch.cat([batch.clean[role].special_N for role in layout.roles]) >= 0
        if layout.source_N is not None:
            special_N = special_N.index_select(0, layout.source_N)
        weight_N = torch.stack(read).sum(0).masked_fill(special_N, 0.0)
        counts_B = (layout.lengths_B * self.share).long() * chosen_B
        place_M = draw_weighted(weight_N, layout.lengths_B, counts_B, draw)
        if place_M.device.type == "meta":  # a plan: nobody knows which, the workers' picks are about as many
            return batch
        drawn_N = torch.zeros_like(special_N).index_fill_(0, place_M, True) & ~special_N
        for name, corruption in self.corruptions.items():
            picked = batch.picked[name]
            place_n = layout.index[picked.role]
            kept_n = torch.zeros_like(place_n, dtype=torch.bool).index_fill_(0, picked.clean_M, True)
            kept_n &= ~chosen_B.to(place_n.device)[layout.row_N[place_n]]
            index_m = (kept_n | drawn_N[place_n]).nonzero().squeeze(1)
            batch = hide(batch, name, picked.role, index_m, corruption, draw.child("hide", name))
        return batch

    def guesses(self, batch: Batch) -> Iterator[tuple[str, Guess]]:
        """What the tokens that the workers hid are taken for."""
        yield from self.then.guesses(batch)
