"""Attention with its scores written out, for runs of rows of equal length: what a CPU does best with dropout or in half
precision.

Rows are brought into an order in which each head's tokens of a row lie end to end, all of them by one copy, and scores
of all runs lie in one tensor, so that a run costs three products going forward and five going back, and what acts on
each score alone is called once. Short rows of like length may make up one run, with places in which nobody is: products
of a few tokens cost more to call than to compute.
"""
# N tokens of the packed batch, M that are read, H heads, K width of a head
# S scores of the whole batch; a run has g rows of n tokens that read m, X = g H

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmpre.dropout import keep_like


@dataclass(frozen=True, eq=False)
class Order:
    """Tokens' heads in the order of runs, rows, heads, tokens: where each stands in [N H], and the way back.

    A place in which nobody is shows the first token.
    """

    there_n: Int[Tensor, "_"]
    back_n: Int[Tensor, "N*H"]

    @staticmethod
    def of(runs: Sequence[Int[Tensor, "g n"]], heads: int) -> "Order":
        """Of the runs' tokens by number, -1 for places in which nobody is."""
        head_H1 = torch.arange(heads)[:, None]
        there_n = torch.cat([(token_gn.clamp(min=0)[:, None] * heads + head_H1).flatten() for token_gn in runs])
        real_n = torch.cat([(token_gn >= 0)[:, None].expand(-1, heads, -1).flatten() for token_gn in runs])
        number_n = torch.arange(len(there_n))[real_n]
        back_n = torch.empty_like(number_n).scatter_(0, there_n[real_n], number_n)
        return Order(there_n, back_n)

    def to(self, device: torch.device) -> "Order":
        return Order(self.there_n.to(device), self.back_n.to(device))

    def sorted(self, x_NHK: Float[Tensor, "N H K"]) -> Float[Tensor, "N*H K"]:
        return x_NHK.reshape(-1, x_NHK.shape[2]).index_select(0, self.there_n)

    def restored(self, x_nK: Float[Tensor, "N*H K"], heads: int) -> Float[Tensor, "N H K"]:
        return x_nK.index_select(0, self.back_n).unflatten(0, (-1, heads))


@dataclass(frozen=True, eq=False)
class Runs:
    """What does not depend on queries, keys and values. `allowed` has a mask for each run, None for everyone; who is
    nobody sees and is seen by no one."""

    groups: Sequence[tuple[int, int, int]]  # rows, n, m
    heads: int
    queries: Order
    keys: Order
    allowed: Sequence[Bool[Tensor, "_ 1 n m"] | None]
    blind: bool  # some tokens may see no one

    def scores(self, x_S: Tensor) -> list[Float[Tensor, "X n m"]]:
        """The parts of a tensor of scores."""
        return self._parts(x_S, [(rows * self.heads, n, m) for rows, n, m in self.groups])

    def of_queries(self, x_nK: Tensor) -> list[Float[Tensor, "X n K"]]:
        return self._parts(x_nK, [(rows * self.heads, n, x_nK.shape[1]) for rows, n, _ in self.groups])

    def of_keys(self, x_nK: Tensor) -> list[Float[Tensor, "X m K"]]:
        return self._parts(x_nK, [(rows * self.heads, m, x_nK.shape[1]) for rows, _, m in self.groups])

    def each(self, score_S: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Each run's scores by row and head, and its mask."""
        for (rows, n, m), part, allowed in zip(self.groups, self.scores(score_S), self.allowed, strict=True):
            yield part.view(rows, self.heads, n, m), allowed

    @property
    def size(self) -> int:
        return sum(rows * self.heads * n * m for rows, n, m in self.groups)

    @staticmethod
    def _parts(x: Tensor, shapes: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        flat = x.view(-1).split([a * b * c for a, b, c in shapes])
        return [part.view(shape) for part, shape in zip(flat, shapes, strict=True)]


class Explicit(torch.autograd.Function):
    """Explicit.apply(q_NHK, k_MHK, v_MHK, runs, dropout, *added); `added`, one a run or none, is added to the scores.

    Scores are divided by the root of K first. Has no second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any, q_NHK: Tensor, k_MHK: Tensor, v_MHK: Tensor, runs: Runs, dropout: float, *added: Tensor
    ) -> Float[Tensor, "N H K"]:
        ctx.runs, ctx.shapes, ctx.scale = runs, [one.shape for one in added], q_NHK.shape[2] ** -0.5
        q_nK, k_nK, v_nK = runs.queries.sorted(q_NHK), runs.keys.sorted(k_MHK), runs.keys.sorted(v_MHK)
        weight_S = q_nK.new_empty(runs.size)
        weights = runs.scores(weight_S)
        lowest = torch.finfo(q_nK.dtype).min  # not infinity: nothing but that has no softmax
        with torch.autocast(q_NHK.device.type, enabled=False):
            for q, k, score in zip(runs.of_queries(q_nK), runs.of_keys(k_nK), weights, strict=True):
                torch.baddbmm(score, q, k.mT, beta=0, alpha=ctx.scale, out=score)
            if added:
                for (score, _), one in zip(runs.each(weight_S), added, strict=True):
                    score += one
            for (score, allowed), weight in zip(runs.each(weight_S), weights, strict=True):
                if allowed is not None:
                    score.masked_fill_(~allowed, lowest)
                torch.softmax(weight, -1, out=weight)
                if allowed is not None and runs.blind:
                    score *= allowed
            keep_S, ctx.up = keep_like(weight_S, dropout) if dropout else (None, 1.0)
            kept_S = weight_S if keep_S is None else weight_S * keep_S
            y_nK = torch.empty_like(q_nK)
            for weight, v, y in zip(runs.scores(kept_S), runs.of_keys(v_nK), runs.of_queries(y_nK), strict=True):
                torch.baddbmm(y, weight, v, beta=0, alpha=ctx.up, out=y)
        ctx.save_for_backward(q_nK, k_nK, v_nK, weight_S, keep_S)
        return runs.queries.restored(y_nK, runs.heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_NHK: Tensor) -> tuple[Tensor | None, ...]:
        runs: Runs = ctx.runs
        q_nK, k_nK, v_nK, weight_S, keep_S = ctx.saved_tensors
        dy_nK = runs.queries.sorted(dy_NHK.to(q_nK.dtype))
        dq_nK, dk_nK, dv_nK = torch.empty_like(q_nK), torch.empty_like(k_nK), torch.empty_like(v_nK)
        dscore_S = torch.empty_like(weight_S)
        kept_S = weight_S if keep_S is None else weight_S * keep_S
        with torch.autocast(dy_NHK.device.type, enabled=False):
            for dy, v, dv, kept, dscore in zip(
                runs.of_queries(dy_nK), runs.of_keys(v_nK), runs.of_keys(dv_nK), runs.scores(kept_S),
                runs.scores(dscore_S), strict=True,
            ):  # fmt: skip
                torch.baddbmm(dv, kept.mT, dy, beta=0, alpha=ctx.up, out=dv)
                torch.baddbmm(dscore, dy, v.mT, beta=0, alpha=ctx.up, out=dscore)
            if keep_S is not None:
                dscore_S *= keep_S
            for weight, dscore in zip(runs.scores(weight_S), runs.scores(dscore_S), strict=True):
                torch._softmax_backward_data(dscore, weight, -1, weight.dtype, grad_input=dscore)
            for q, k, dq, dk, dscore in zip(
                runs.of_queries(q_nK), runs.of_keys(k_nK), runs.of_queries(dq_nK), runs.of_keys(dk_nK),
                runs.scores(dscore_S), strict=True,
            ):  # fmt: skip
                torch.baddbmm(dq, dscore, k, beta=0, alpha=ctx.scale, out=dq)
                torch.baddbmm(dk, dscore.mT, q, beta=0, alpha=ctx.scale, out=dk)
        dadded = [
            dscore.sum_to_size(shape) for (dscore, _), shape in zip(runs.each(dscore_S), ctx.shapes, strict=False)
        ]
        back = [runs.queries.restored(dq_nK, runs.heads), *(runs.keys.restored(d, runs.heads) for d in (dk_nK, dv_nK))]
        return (*back, None, None, *dadded)
