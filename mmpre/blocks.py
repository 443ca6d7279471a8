"""The encoder: blocks of sublayers over a packed batch. Variants are composed, not flagged: see encoder.py."""
# N tokens of the packed batch, M places asked for, D model width

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmpre.attention import Plan
from mmpre.layout import Layout
from mmpre.sublayers.protocol import Places, Sublayer, narrowed


class Block(nn.Module):
    """Sublayers one after the other: a layer, in the count of `read`."""

    def __init__(self, sublayers: Sequence[Sublayer]) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)
        self.mixes = any(sublayer.mixes for sublayer in sublayers)
        self.narrow = _last_mixing(sublayers)

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        for i, sublayer in enumerate(self.sublayers):
            x_ND = sublayer(x_ND, layout, plan, at if i == self.narrow else None)
        return x_ND


class Averaged(nn.Module):
    """Sublayers one after the other, each followed by a learned average of what came in and all states since.

    At first the average is the newest state alone. For the encoder it is one layer.
    Source: DenseFormer, Pagliardini et al. 2024, arXiv:2402.02622.
    """

    mixes = True

    def __init__(self, sublayers: Sequence[Sublayer]) -> None:
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)
        self.shares = nn.ParameterList(torch.eye(i + 2)[-1].clone() for i in range(len(sublayers)))

    def forward(
        self, x_ND: Float[Tensor, "N D"], layout: Layout, plan: Plan, at: Places = None
    ) -> Float[Tensor, "_ D"]:
        states = [x_ND]
        for sublayer, share_S in zip(self.sublayers, self.shares, strict=True):
            states.append(sublayer(x_ND, layout, plan))
            x_ND = sum(share * state_ND for share, state_ND in zip(share_S, states, strict=True))
        return narrowed(x_ND, at)


@dataclass(frozen=True)
class States:
    """The encoder's result, and the states of all tokens after some of its layers (0: what came in)."""

    last: Float[Tensor, "_ D"]
    layer: Mapping[int, Float[Tensor, "N D"]]


class Encoder(nn.Module):
    """Blocks one after the other, and a closing norm where there is one.

    With `recompute`, a block's inner values are computed again in the backward pass instead of being kept (gradient
    checkpointing): less memory, about a third more time, the same numbers. It may be set on an encoder at any time.
    """

    def __init__(self, blocks: Sequence[Sublayer], norm: nn.Module | None = None, *, recompute: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.recompute = recompute
        self.narrow = _last_mixing(blocks)

    @overload
    def forward(self, x_ND: Tensor, layout: Layout, plan: Plan, *, at: Places = None, read: None = None) -> Tensor: ...

    @overload
    def forward(
        self, x_ND: Tensor, layout: Layout, plan: Plan, *, at: Places = None, read: Collection[int]
    ) -> States: ...

    def forward(
        self,
        x_ND: Float[Tensor, "N D"],
        layout: Layout,
        plan: Plan,
        *,
        at: Places = None,
        read: Collection[int] | None = None,
    ) -> Float[Tensor, "_ D"] | States:
        """Return the states of all tokens, or of those at the places `at` (M of them).

        What follows the last mixing sublayer's reading is then computed for these alone. With `read`, the states of
        all tokens after those layers are returned too: before the closing norm, layer 0 being what came in.
        """
        read = read if read is None else frozenset(read)
        if read and not read <= set(range(len(self.blocks) + 1)):
            raise ValueError(
                f"Encoder: can read layers 0 (what comes in) to {len(self.blocks)}, asked for {sorted(read)}"
            )
        # A layer that is read needs all its tokens: then the places are picked out after it.
        early = len(self.blocks) > self.narrow >= max(read or (0,))
        layer = {}
        for i, block in enumerate(self.blocks):
            if read and i in read:
                layer[i] = x_ND
            x_ND = self._run(
                block, x_ND, layout, plan.of_layer(i, len(self.blocks)), at if early and i == self.narrow else None
            )
        if read and len(self.blocks) in read:
            layer[len(self.blocks)] = x_ND
        if not early:
            x_ND = narrowed(x_ND, at)
        if self.norm is not None:
            x_ND = self.norm(x_ND)
        return x_ND if read is None else States(x_ND, layer)

    def _run(self, block: nn.Module, x_ND: Tensor, layout: Layout, plan: Plan, at: Places) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, x_ND, layout, plan, at, use_reentrant=False)  # keeps the generators' states
        return block(x_ND, layout, plan, at)


def _last_mixing(sublayers: Sequence[Sublayer]) -> int:
    """After this one only the places asked for are needed."""
    return max((i for i, sublayer in enumerate(sublayers) if sublayer.mixes), default=0)
