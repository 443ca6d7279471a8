"""Tell what belongs to a row among others of the micro-batch."""
# N tokens of the packed batch, B rows, O options of a row, P = B O pairs, D model width

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpre.attention import Attend, Full
from mmpre.batch import Batch
from mmpre.draw import Draw
from mmpre.layout import Layout
from mmpre.network import Network
from mmpre.objectives.loss import Loss, Term


class Among(nn.Module):
    """For each row, its own tokens of role `other` among those of `options` - 1 other rows: listwise matching.

    The pairs are put together from the embedded tokens, so fronts run once, and encoded anew; `head` gives a score
    from the state of a pair's first token of role `pool`. Cross-entropy over the options, scores divided by the
    temperature. Other rows are drawn without replacement; a micro-batch of fewer rows has fewer options.
    Source: visual-text matching of VIOLET (Fu et al. 2021, arXiv:2111.12681) in the authors' code.
    """

    def __init__(
        self, keep: str, other: str, pool: str, head: nn.Module, *, options: int = 4, temperature: float = 0.05,
        attend: Attend | None = None, name: str = "vtm", weight: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if options < 2 or not temperature > 0:
            raise ValueError(
                f"Among: options must be at least 2 and temperature above 0, got options {options}, temperature "
                f"{temperature}"
            )
        self.keep, self.other, self.pool, self.head = keep, other, pool, head
        self.options, self.temperature, self.attend = options, temperature, attend or Full()
        self.name, self.weight = name, weight

    def forward(self, net: Network, x_ND: Float[Tensor, "N D"], batch: Batch, draw: Draw) -> Loss:
        rows = len(batch.layout)
        option_BO = self.choose(rows, draw)
        row_P = torch.arange(rows).repeat_interleave(option_BO.shape[1])
        score_P = self._scores(net, x_ND, batch.layout, row_P, option_BO.flatten()) / self.temperature
        score_BO = score_P.view(option_BO.shape)
        loss = F.cross_entropy(score_BO, score_BO.new_zeros(rows, dtype=torch.int64), reduction="sum")
        right = (score_BO.detach().argmax(1) == 0).sum()
        return Loss([Term(self.name, loss, "rows", self.weight)], {f"{self.name}_accuracy": (right, "rows")})

    def between(self, net: Network, batch: Batch) -> Callable[[Int[Tensor, "P"], Int[Tensor, "P"]], Float[Tensor, "P"]]:
        """Embed a batch once; the function then scores pairs of its rows: the first ones' `keep`, the others' `other`.

        Fine-tuning and retrieval score all B x B pairs so, the temperature left out.
        """
        x_ND = net.embed(batch)
        return lambda keep_P, other_P: self._scores(net, x_ND, batch.layout, keep_P, other_P)

    def _scores(
        self, net: Network, x_ND: Float[Tensor, "N D"], layout: Layout, keep_P: Int[Tensor, "P"],
        other_P: Int[Tensor, "P"],
    ) -> Float[Tensor, "P"]:  # fmt: skip
        made, place_n, order_P = layout.pair({self.keep: keep_P, self.other: other_P})
        plan = self.attend.plan(made).to(x_ND.device)
        state_PD = net.encode(x_ND.index_select(0, place_n), made, plan, at=made.first(self.pool))
        score_P = self.head(state_PD).float().reshape(-1)
        return torch.empty_like(score_P).index_copy(0, order_P, score_P)

    def choose(self, rows: int, draw: Draw) -> Int[Tensor, "B O"]:
        """The rows whose `other` each row is paired with, its own first."""
        chance_BB = torch.rand(rows, rows, generator=draw.rng("options")).fill_diagonal_(-1.0)
        others_BO = chance_BB.topk(min(self.options, rows) - 1, dim=1).indices
        return torch.cat([torch.arange(rows)[:, None], others_BO], dim=1)
