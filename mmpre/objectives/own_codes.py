"""Predict codes of hidden tokens that the network learns along the way, by telling them from others half-way up."""
# N places of the packed batch, M picked tokens, B rows, n at most in one row, K distractors, D model width,
# G groups, V codes of a group, C values of a code's vector, W values that are compared

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmpre.absent import Absent
from mmpre.batch import Batch, Picked
from mmpre.draw import Draw
from mmpre.gumbel import Chosen, GumbelCodes, perplexity
from mmpre.modality import Reader
from mmpre.network import Network
from mmpre.objectives.loss import Loss, Term


@dataclass(frozen=True)
class Others:
    """For each picked token, K others of its row, as their numbers among the picked; none where it is alone."""

    index_MK: Int[Tensor, "M K"]
    none_M: Bool[Tensor, "M"]

    @staticmethod
    def drawn(row_M: Int[Tensor, "M"], rows: int, count: int, draw: Draw) -> "Others":
        """Draw with replacement, each other one with the same chance. `row_M` does not fall."""
        size_B = torch.zeros(rows, dtype=torch.int64, device=row_M.device).index_add(0, row_M, torch.ones_like(row_M))
        first_M = (size_B.cumsum(0) - size_B)[row_M]
        own_M1 = (torch.arange(len(row_M), device=row_M.device) - first_M)[:, None]
        others_M1 = size_B[row_M][:, None] - 1
        rng = draw.rng("distractors", device=row_M.device)
        chance_MK = torch.rand(len(row_M), count, generator=rng, device=row_M.device)
        number_MK = (chance_MK * others_M1).long().minimum(others_M1 - 1).clamp(min=0)
        number_MK = number_MK + ((number_MK >= own_M1) & (others_M1 > 0))
        return Others(first_M[:, None] + number_MK, others_M1[:, 0] == 0)


class OwnCodes(nn.Module):
    """Two tasks on the same hidden tokens of one role, about codes that `book` makes of their clean features.

    At layer `tap` a state shall know the vector of its own token's code among those of `distractors` other picked
    tokens of the row, by softmax over cosines divided by `kappa`; those of the same code do not count. From the last
    state the code's number is predicted. `compare` is the width that both sides of the first task are mapped to, 0 for
    no maps. `diversity` weighs how far the codes' mean share is from using all alike: 0 if they are, nearly 1 where one
    is taken always. It is the mean share over a micro-batch.
    Codes learn from the first task and the third term alone, unless `through`: then also from being predicted, which
    makes them easy to predict. `contrast` and `predict` are weights of the two tasks; one of weight 0 is left out.
    Source: w2v-BERT, Chung et al. 2021, arXiv:2108.06209, section 2.
    """

    def __init__(
        self, net: Network, pick: str, book: GumbelCodes, *, tap: int, width: int, compare: int = 0,
        distractors: int = 100, kappa: float = 0.1, contrast: float = 1.0, diversity: float = 0.1,
        predict: float = 1.0, through: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        size, depth = book.groups * book.vector_GVc.shape[2], len(net.encoder.blocks)
        problems = []
        if not 0 < tap <= depth:
            problems.append(f"the tap must be one of the layers 1 to {depth}, got {tap}")
        if not compare and size != width and contrast:
            problems.append(f"states of width {width} and code vectors of {size} need `compare`, a width for both")
        if distractors < 1 or not kappa > 0:
            problems.append(f"distractors must be at least 1 and kappa above 0, got {distractors} and {kappa}")
        if min(contrast, predict) < 0 or not contrast + predict > 0:
            problems.append(f"contrast and predict are weights, not both 0, got {contrast} and {predict}")
        if len(net.modalities) != 1:
            problems.append(f"rows must have one role, the network reads {', '.join(net.modalities)}")
        if problems:
            raise ValueError("OwnCodes: " + "; ".join(problems))
        self.net, self.pick, self.book, self.tap, self.through = net, pick, book, tap, through
        self.distractors, self.kappa = distractors, kappa
        self.weights = {"contrast": contrast, "diversity": diversity, "predict": predict}
        maps = bool(compare and contrast)
        self.state_to = nn.Linear(width, compare) if maps else nn.Identity()
        self.code_to = nn.Linear(size, compare) if maps else nn.Identity()
        self.head = nn.Linear(width, book.groups * book.codes) if predict else None
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @property
    def readers(self) -> Mapping[str, Reader]:
        return self.net.readers

    def forward(self, batch: Batch, draw: Draw) -> Loss:
        picked, per = self._picked(batch), f"picked:{self.pick}"
        chosen, (tap_MD, last_MD) = self.coded(batch, draw), self._states(batch, picked)
        count, used = len(picked), perplexity(chosen.mean_share())
        terms = {"diversity": count * (1 - used / chosen.share_MGV[0].numel() if count else used * 0)}
        metrics = {"perplexity": used.detach() * count}
        if self.weights["contrast"]:
            row_M = batch.layout.row_N[batch.layout.at(picked.role, picked.seen_M)]
            others = Others.drawn(row_M, len(batch.layout), self.distractors, draw)
            longest = int(batch.layout.lengths_B.max())
            score_Mk = self.scores(tap_MD, chosen, row_M, others, len(batch.layout), longest)
            terms["contrast"] = F.cross_entropy(score_Mk, torch.zeros_like(row_M), reduction="sum")
            own_M, other_M = score_Mk.detach()[:, 0], score_Mk.detach()[:, 1:].amax(1)
            metrics["contrast_accuracy"] = ((own_M > other_M) & other_M.isfinite()).sum()  # missed without a choice
        if self.head is not None:
            score_MGV = self._predicted(last_MD)
            target_MGV = chosen.choice_MGV if self.through else chosen.choice_MGV.detach()
            terms["predict"] = -(target_MGV * score_MGV.log_softmax(2)).sum()
            metrics["predict_accuracy"] = self._right(score_MGV, chosen).sum() / self.book.groups
        return Loss(
            [Term(name, terms[name], per, weight) for name, weight in self.weights.items() if name in terms],
            {name: (value, per) for name, value in metrics.items()},
        )

    def coded(self, batch: Batch, draw: Draw) -> Chosen:
        """The codes of the picked tokens, as they are unhidden."""
        picked = self._picked(batch)
        f_NE = self.net.modalities[picked.role].features(batch.clean[picked.role])
        return self.book(f_NE.index_select(0, picked.clean_M), draw)

    def told(self, batch: Batch, draw: Draw) -> tuple[Chosen, Bool[Tensor, "M G"] | None]:
        """The codes, and which of them the last states say right (None where nobody asked them)."""
        chosen, (_, last_MD) = self.coded(batch, draw), self._states(batch, self._picked(batch))
        return chosen, None if self.head is None else self._right(self._predicted(last_MD), chosen)

    def scores(
        self, state_MD: Float[Tensor, "M D"], chosen: Chosen, row_M: Int[Tensor, "M"], others: Others, rows: int, n: int
    ) -> Float[Tensor, "M _"]:
        """Cosines over kappa: first with a token's own code, then with those of the K others, -inf where equal.

        All pairs of a row are compared, and those asked for are picked out: so nothing is as large as M K W.
        """
        with torch.autocast(state_MD.device.type, enabled=False):
            state_MW = F.normalize(self.state_to(state_MD.float()), dim=1, eps=1e-8)
            code_MW = F.normalize(self.code_to(chosen.vector_MC), dim=1, eps=1e-8)
            number_M = torch.arange(len(row_M), device=row_M.device)
            first_B = torch.full((rows,), len(row_M), device=row_M.device).scatter_reduce(0, row_M, number_M, "amin")
            place_M = number_M - first_B[row_M]  # among the picked of its row

            def by_row(x_MW: Tensor) -> Float[Tensor, "B n W"]:
                flat = x_MW.new_zeros(rows * n, x_MW.shape[1]).index_copy(0, row_M * n + place_M, x_MW)
                return flat.view(rows, n, -1)

            score_Bnn = by_row(state_MW) @ by_row(code_MW).mT / self.kappa
            pair_Mk = place_M[torch.cat([number_M[:, None], others.index_MK], 1)] + ((row_M * n + place_M) * n)[:, None]
            score_Mk = score_Bnn.flatten().index_select(0, pair_Mk.flatten()).view(pair_Mk.shape)
        code_MG = chosen.code_MG
        same_MK = (code_MG[others.index_MK] == code_MG[:, None]).all(2) | others.none_M[:, None]
        return score_Mk.masked_fill(F.pad(same_MK, (1, 0)), -torch.inf)

    def _states(self, batch: Batch, picked: Picked) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M D"]]:
        place_M = batch.layout.at(picked.role, picked.seen_M)
        states = self.net(batch, at=place_M, read=[self.tap])
        return states.layer[self.tap].index_select(0, place_M), states.last

    def _predicted(self, state_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M G V"]:
        return self.head(state_MD).float().unflatten(1, (self.book.groups, self.book.codes))

    @staticmethod
    def _right(score_MGV: Float[Tensor, "M G V"], chosen: Chosen) -> Bool[Tensor, "M G"]:
        return score_MGV.detach().max(2).indices == chosen.code_MG

    def _picked(self, batch: Batch) -> Picked:
        if self.pick not in batch.picked:
            raise Absent(f"OwnCodes: no pick {self.pick!r} in the batch; the task's view makes {sorted(batch.picked)}")
        return batch.picked[self.pick]
