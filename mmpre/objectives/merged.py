"""Reconstruct every token through merged ones, through fewer of them, and from masks where merging was hard.

Source: MergeDNA, Li et al. 2025, arXiv:2511.14806.
"""
# N tokens of the packed batch, L merged tokens, B rows, V ids

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmpre.batch import Batch
from mmpre.draw import Draw
from mmpre.heads.guess import Guess
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.weighted import draw_weighted
from mmpre.merging import Merge
from mmpre.merging_encoder import Merged, MergingEncoder
from mmpre.modality import Reader
from mmpre.network import Network
from mmpre.objectives.loss import Loss, Term

LONGEST = 4  # tokens in one: how many merged tokens hold so many is logged, those of more together with these


@dataclass(frozen=True, kw_only=True)
class DrawnShare:
    """Which share of the tokens the local encoder leaves, drawn for each step: normal, cut off at two bounds."""

    mean: float = 0.5
    deviation: float = 0.05
    low: float = 0.4
    high: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.low <= self.mean <= self.high <= 1 or self.deviation < 0:
            raise ValueError(
                "DrawnShare: wanted 0 < low <= mean <= high <= 1 and a deviation of at least 0, got "
                f"{self.low}, {self.mean}, {self.high} and {self.deviation}"
            )

    def at(self, draw: Draw) -> float:
        """The same for all micro-batches of a step."""
        rng = replace(draw, place=("step", draw.step)).rng("share")
        return min(max(self.mean + self.deviation * float(torch.randn((), generator=rng)), self.low), self.high)


class MergedReconstruction(nn.Module):
    """Three passes of a network whose encoder merges (`MergingEncoder`), each with a cross-entropy of the ids.

    all      every token from the merged ones, over all tokens
    latent   the same where the latent encoder merges on, to `latent` of the merged tokens; the local encoder gets no
             gradient of it, and the term has the weight `latent_weight`
    masked   as many merged tokens as that are drawn without replacement, each in proportion to 1 / g^2 where the latent
             encoder put g of them together (`adaptive`), or all alike; the tokens in them are masked, everything is
             read again, and the loss is the sum over the masked tokens divided by how many merged ones were drawn

    `role` is the modality's; `head` predicts its ids. The share that is left is drawn for each step; so is, in all
    passes, the number of merges alike.
    """

    def __init__(
        self, net: Network, role: str, head: Vocabulary, *, shares: DrawnShare | None = None, latent: float = 0.5,
        latent_weight: float = 0.25, masked_weight: float = 1.0, adaptive: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if not isinstance(net.encoder, MergingEncoder):
            raise ValueError(
                f"MergedReconstruction: wanted a network with a MergingEncoder, got {type(net.encoder).__name__}"
            )
        if not 0 < latent < 1:
            raise ValueError(f"MergedReconstruction: latent is a share, above 0 and below 1; got {latent}")
        self.net, self.role, self.head, self.shares = net, role, head, shares or DrawnShare()
        net.encoder.check_share(self.shares.low)
        self.latent, self.latent_weight, self.masked_weight = latent, latent_weight, masked_weight
        self.adaptive = adaptive

    @property
    def readers(self) -> Mapping[str, Reader]:
        return self.net.readers

    def forward(self, batch: Batch, draw: Draw) -> Loss:
        encoder, layout, share = self.net.encoder, batch.layout, self.shares.at(draw)
        merged, state_ND = self._read(batch, share)
        all_N, right_N = self._cost(state_ND, batch)
        fewer, groups = encoder.latent(merged.detached(), share=self.latent)
        latent_N, also_N = self._cost(encoder.decode(fewer, layout), batch)
        picked_L = self.picked(merged, groups, draw)
        masked_N = merged.merge.back(picked_L)
        hidden = replace(batch, replaced={**batch.replaced, self.role: masked_N})
        again, state_ND = self._read(hidden, share)
        cost_N, found_N = self._cost(state_ND, batch)
        drawn = share * self.latent  # of the tokens of a step: how many are divided by, alike in all its parts
        terms = [
            Term("all", all_N.sum(), "tokens"),
            Term("latent", latent_N.sum(), "tokens", self.latent_weight),
            Term("masked", (cost_N * masked_N).sum() / drawn, "tokens", self.masked_weight),
        ]
        metrics = {"all_accuracy": right_N.sum(), "latent_accuracy": also_N.sum(), "masked_share": masked_N.sum()}
        per_masked = layout.size / masked_N.sum().clamp(min=1)
        metrics["masked_accuracy"] = (found_N & masked_N).sum() * per_masked
        metrics |= self._spans(merged, picked_L) | self._masked_spans(again, masked_N)
        return Loss(terms, {name: (value, "tokens") for name, value in metrics.items()})

    def picked(self, merged: Merged, groups: Merge, draw: Draw) -> Bool[Tensor, "L"]:
        """Which merged tokens are masked: exactly `latent` of each row's, rounded, and at least one."""
        lengths_B = merged.layout.lengths_B
        count_B = torch.minimum((lengths_B.double() * self.latent).round().long().clamp(min=1), lengths_B)
        weight_L = torch.ones_like(merged.size_L)
        if self.adaptive:
            weight_L = groups.back(groups.sum(weight_L)) ** -2
        index_K = draw_weighted(weight_L, lengths_B, count_B, draw)
        return torch.zeros_like(weight_L, dtype=torch.bool).index_fill(0, index_K, True)

    def guesses(self, batch: Batch) -> Iterator[tuple[str, Guess]]:
        """What the head takes tokens for, of which the view picked some."""
        for name, one in batch.picked.items():
            state_MD = self.net(batch, at=batch.layout.at(one.role, one.seen_M))
            yield name, self.head.guess(state_MD, batch.clean[one.role], one.clean_M)

    def _read(self, batch: Batch, share: float) -> tuple[Merged, Float[Tensor, "N D"]]:
        """What the local encoder makes of a batch, and the decoded states, with no merges in the latent encoder."""
        encoder = self.net.encoder
        merged = encoder.local(self.net.embed(batch), batch.layout, share=share)
        thought, _ = encoder.latent(merged)
        return merged, encoder.decode(thought, batch.layout)

    def _cost(self, state_ND: Float[Tensor, "N D"], batch: Batch) -> tuple[Float[Tensor, "N"], Bool[Tensor, "N"]]:
        """The loss of each token, and whether the likeliest id is its own."""
        score_NV, id_N = self.head.scores(state_ND), batch.clean[self.role][self.head.field]
        return self.head.loss(score_NV, id_N).float(), score_NV.detach().max(1).indices == id_N

    def _spans(self, merged: Merged, picked_L: Bool[Tensor, "L"]) -> dict[str, Tensor]:
        """How many of the merged tokens are so long, and how long those are that were masked."""
        length_L, size = merged.size_L.clamp(max=LONGEST), len(merged.merge.source_N)
        many = size / max(len(length_L), 1)
        found = {f"of_{n}": (length_L == n).sum() * many for n in range(1, LONGEST + 1)}
        return found | {"masked_size": (merged.size_L * picked_L).sum() * size / picked_L.sum().clamp(min=1)}

    def _masked_spans(self, again: Merged, masked_N: Bool[Tensor, "N"]) -> dict[str, Tensor]:
        """How many of the masked tokens went into merged ones so long when they were read as masks: as these are alike,
        they merge first, and then into long ones."""
        length_N = again.merge.back(again.size_L.clamp(max=LONGEST)).masked_fill(~masked_N, 0)
        many = len(masked_N) / masked_N.sum().clamp(min=1)
        return {f"masked_of_{n}": (length_N == n).sum() * many for n in range(1, LONGEST + 1)}
