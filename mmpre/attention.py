"""Who may attend to whom in a packed batch.

An `Attend` says it; its `plan(layout)` is made in the loading worker and holds what the backends of
attention_backends.py need to know.
"""
# B rows, n tokens of one row

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmpre.tokens import Layout

CPU = torch.device("cpu")


@runtime_checkable
class Attend(Protocol):
    """Who may attend to whom; picklable. `dense` is the definition, and every backend must agree with it."""

    def plan(self, layout: Layout) -> "Plan": ...

    def dense(self, layout: Layout, row: int) -> Bool[Tensor, "n n"]:
        """True where a token of the row (first axis) may attend to another one (second axis)."""
        ...


@dataclass(frozen=True)
class Plan:
    """An Attend for the rows of one batch. What a backend wants beyond lengths is made when first asked for.

    `causal` says that tokens see only themselves and those before them. The layout serves for its lengths alone and
    stays on the CPU, so planning never waits for a device.
    """

    attend: Attend
    layout: Layout
    causal: bool = False
    device: torch.device = CPU

    def __post_init__(self) -> None:
        _ = self.groups  # made here, in the worker

    def to(self, device: torch.device | str) -> "Plan":
        device = torch.device(device)
        return self if device == self.device else replace(self, device=device)

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """Runs of neighbouring rows of equal length, as (rows, length), without rows that have no token."""
        return [(rows, length) for rows, length in self.layout.groups if length]

    @cached_property
    def lengths(self) -> list[int]:
        """The rows' lengths, without rows that have no token."""
        return [length for rows, length in self.groups for _ in range(rows)]

    @cached_property
    def starts(self) -> Int[Tensor, "B+1"]:
        """Where each row starts, and where the last one ends, on the device: what torch's varlen attention reads."""
        return torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32).to(self.device, non_blocking=True)

    @cached_property
    def xformers_bias(self) -> Any:
        """The block-diagonal bias object of xFormers."""
        from xformers.ops import fmha

        kind = fmha.attn_bias.BlockDiagonalMask
        if self.causal:
            kind = fmha.attn_bias.BlockDiagonalCausalMask
        return kind.from_seqlens(self.lengths, device=self.device)


@dataclass(frozen=True)
class Full:
    """Every token of a row attends to all tokens of the row."""

    def plan(self, layout: Layout) -> Plan:
        return Plan(self, layout)

    def dense(self, layout: Layout, row: int) -> Bool[Tensor, "n n"]:
        n = int(layout.lengths_B[row])
        return torch.ones(n, n, dtype=torch.bool)


@dataclass(frozen=True)
class Causal:
    """Every token of a row attends to itself and to those before it."""

    def plan(self, layout: Layout) -> Plan:
        return Plan(self, layout, causal=True)

    def dense(self, layout: Layout, row: int) -> Bool[Tensor, "n n"]:
        n = int(layout.lengths_B[row])
        return torch.ones(n, n, dtype=torch.bool).tril()
