"""An encoder that merges tokens on its way, in windows and then anywhere, and decodes each token's own state.

Source: MergeDNA, Li et al. 2025, arXiv:2511.14806.
"""
# N tokens of the packed batch, L that the local part leaves of them, D model width, G width of the grouping vectors

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpre.attention import Plan
from mmpre.attention.rules import EVERYONE
from mmpre.blocks import Block, States
from mmpre.layout import Layout
from mmpre.merging import Merge, Windows, by_layers, merge_halves, merge_neighbours, most_halves, most_neighbours
from mmpre.sublayers.protocol import Places, narrowed

Seen = Callable[[Tensor], None]


@dataclass(frozen=True)
class Merged:
    """States of merged tokens; for each the place of its first token in its row, and of how many it is made."""

    state_LD: Float[Tensor, "L D"]
    merge: Merge
    position_L: Int[Tensor, "L"]
    size_L: Float[Tensor, "L"]

    @property
    def layout(self) -> Layout:
        return self.merge.layout

    def plan(self) -> Plan:
        """Every merged token reads all those of its row, each as often as it has tokens."""
        alone = self.layout.size == len(self.merge.source_N)
        return Plan(
            self.layout, given_N=self.position_L, counts_M=None if alone else self.size_L, device=self.state_LD.device
        )

    def joined(self, step: Merge, weight_L: Float[Tensor, "L"] | None = None) -> "Merged":
        """What a further merge makes of them; weights are sizes unless given."""
        weight_L = self.size_L if weight_L is None else weight_L
        return Merged(
            step.mean(self.state_LD, weight_L), self.merge.then(step), step.first(self.position_L),
            step.sum(self.size_L),
        )  # fmt: skip

    def detached(self) -> "Merged":
        return replace(self, state_LD=self.state_LD.detach())


class MergingEncoder(nn.Module):
    """A local encoder, a latent encoder, a latent decoder and a local decoder; all blocks are attention and then
    feed-forward, and what merges does so between the two.

    The local encoder sees windows of `window` tokens of the row, and in each of its layers merges neighbours in them by
    the cosine of grouping vectors (`group` wide) of a map of its own, until a share of the tokens is left. The latent
    encoder and decoder see whole rows of merged tokens; the latent encoder merges on, anywhere in the row and by the
    cosine of states, where it is asked to. The local decoder sees every token again, each with what it went into, in
    windows. As an `Encoder` it keeps `share` of the tokens, and gives a state to each token after every layer.
    """

    def __init__(
        self, local: Sequence[Block], latent: Sequence[Block], latent_decoder: Sequence[Block],
        local_decoder: Sequence[Block], norm: nn.Module, *, width: int, window: int = 16, group: int = 64,
        share: float = 0.5, temperature: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        if not 0 < share <= 1 or window < 1:
            raise ValueError(
                f"MergingEncoder: wanted a share above 0 and at most 1 and a window of at least 1 token, got {share} "
                f"and {window}"
            )
        self.blocks = nn.ModuleList([*local, *latent, *latent_decoder, *local_decoder])
        self.parts = [len(part) for part in (local, latent, latent_decoder, local_decoder)]
        self.groups = nn.ModuleList(nn.Linear(width, group, bias=False) for _ in local)
        self.norm, self.window, self.share, self.temperature = norm, window, share, temperature

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, *, at: Places = None,
        read: Collection[int] | None = None,
    ) -> Float[Tensor, "_ D"] | States:  # fmt: skip
        """As `Encoder.forward`; states of merged tokens are given to all that went into them."""
        if plan is not None and (plan.layers or plan.rule != EVERYONE):
            raise ValueError(
                f"MergingEncoder: says itself who sees whom and wants the view's attend to be Full(), got {plan.rule}"
            )
        states = [x_ND]
        merged = self.local(x_ND, layout, seen=states.append)
        merged, _ = self.latent(merged, seen=states.append)
        last_ND = narrowed(self.decode(merged, layout, seen=states.append), at)
        return last_ND if read is None else States(last_ND, {layer: states[layer] for layer in read})

    def check_share(self, share: float) -> None:
        """Raises ValueError where the local layers cannot leave so small a share of a whole window."""
        with torch.device("cpu"):  # networks may be made without numbers
            least = max(1, math.floor(self.window * share))  # some windows of a row are rounded down
            by_layers(torch.tensor([self.window]), torch.tensor([least]), len(self._part(0)), most_neighbours)

    def local(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, *, share: float | None = None, seen: Seen | None = None
    ) -> Merged:
        """Read windows and merge neighbours, until `share` of a row's tokens is left, rounded."""
        blocks, device = self._part(0), x_ND.device
        cut = Windows.of(layout, self.window, self.share if share is None else share)
        fewer = by_layers(cut.layout.lengths_B, cut.goal_W, len(blocks), most_neighbours)
        place_N, position_N, back_N = (
            one.to(device, non_blocking=True) for one in (cut.place_N, cut.position_N, cut.back_N)
        )
        ones_N = torch.ones(layout.size, device=device)
        now = Merged(x_ND.index_select(0, place_N), Merge.none(cut.layout, device), position_N, ones_N)
        plan = now.plan()
        for block, group, fewer_W in zip(blocks, self.groups, fewer, strict=True):
            attention, feed_forward = block.sublayers
            now = replace(now, state_LD=attention(now.state_LD, now.layout, plan))
            if bool(fewer_W.any()):
                g_LG = F.normalize(group(now.state_LD).float(), dim=-1)
                similar_L = (g_LG * g_LG.roll(-1, 0)).sum(1)
                step, gate_L = merge_neighbours(similar_L, now.layout, fewer_W, temperature=self.temperature)
                now = now.joined(step, now.size_L * gate_L)
                plan = now.plan()
            now = replace(now, state_LD=feed_forward(now.state_LD, now.layout, plan))
            if seen is not None:
                seen(now.merge.back(now.state_LD).index_select(0, back_N))
        merge, place_L = cut.together(now.merge)
        state_LD, position_L, size_L = (
            one.index_select(0, place_L) for one in (now.state_LD, now.position_L, now.size_L)
        )
        return Merged(state_LD, merge, position_L, size_L)

    def latent(self, merged: Merged, *, share: float = 1.0, seen: Seen | None = None) -> tuple[Merged, Merge]:
        """Read whole rows; with a `share` below 1 merge on until that of the merged tokens is left, rounded.

        Returns the states of all merged tokens, and which of them went together.
        """
        blocks, lengths_B = self._part(1), merged.layout.lengths_B
        goal_B = torch.minimum((lengths_B.double() * share).round().long().clamp(min=1), lengths_B)
        now, plan = replace(merged, merge=Merge.none(merged.layout, merged.state_LD.device)), merged.plan()
        for block, fewer_B in zip(blocks, by_layers(lengths_B, goal_B, len(blocks), most_halves), strict=True):
            attention, feed_forward = block.sublayers
            now = replace(now, state_LD=attention(now.state_LD, now.layout, plan))
            if bool(fewer_B.any()):
                now = now.joined(merge_halves(now.state_LD, now.layout, fewer_B))
                plan = now.plan()
            now = replace(now, state_LD=feed_forward(now.state_LD, now.layout, plan))
            if seen is not None:
                seen(merged.merge.back(now.merge.back(now.state_LD)))
        return replace(merged, state_LD=now.merge.back(now.state_LD)), now.merge

    def decode(self, merged: Merged, layout: Layout, *, seen: Seen | None = None) -> Float[Tensor, "N D"]:
        """The state of each token, from those of merged ones."""
        plan = merged.plan()
        for block in self._part(2):
            merged = replace(merged, state_LD=block(merged.state_LD, merged.layout, plan))
            if seen is not None:
                seen(merged.merge.back(merged.state_LD))
        x_ND, cut = merged.merge.back(merged.state_LD), Windows.of(layout, self.window)
        place_N, position_N, back_N = (
            one.to(x_ND.device, non_blocking=True) for one in (cut.place_N, cut.position_N, cut.back_N)
        )
        plan = Plan(cut.layout, given_N=position_N, device=x_ND.device)
        x_ND = x_ND.index_select(0, place_N)
        for block in self._part(3):
            x_ND = block(x_ND, cut.layout, plan)
            if seen is not None:
                seen(x_ND.index_select(0, back_N))
        return self.norm(x_ND.index_select(0, back_N))

    def _part(self, number: int) -> list[Block]:
        first = sum(self.parts[:number])
        return list(self.blocks[first : first + self.parts[number]])
