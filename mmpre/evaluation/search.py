"""Retrieval by vectors: for each query, which items are nearest? Exact, some queries at a time."""
# Q queries, P items, D width

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import comb as ways

from mmpre.evaluation.results import NotMeasured, Result, mean, statistic

CHUNK = 512  # queries at a time


@dataclass(frozen=True)
class Found:
    """Where each query's best right item stands: how many wrong ones score higher, and how many wrong and right ones
    score the same as it. `right_Q` counts the right items."""

    above_Q: Int[np.ndarray, "Q"]
    tied_Q: Int[np.ndarray, "Q"]
    best_Q: Int[np.ndarray, "Q"]
    right_Q: Int[np.ndarray, "Q"]

    @staticmethod
    def by(score_QP: Float[np.ndarray, "Q P"], right_QP: Bool[np.ndarray, "Q P"]) -> "Found":
        best_Q1 = np.where(right_QP, score_QP, -np.inf).max(1, keepdims=True)
        same_QP, wrong_QP = score_QP == best_Q1, ~right_QP
        above_Q = ((score_QP > best_Q1) & wrong_QP).sum(1)
        return Found(above_Q, (same_QP & wrong_QP).sum(1), (same_QP & right_QP).sum(1), right_QP.sum(1))

    @property
    def rank_Q(self) -> Float[np.ndarray, "Q"]:
        """How many items come before the best right one; ties count half."""
        return self.above_Q + self.tied_Q / 2

    def within(self, k: int) -> Float[np.ndarray, "Q"]:
        """The chance that a right item is among the first `k`, where those that score the same come in any order."""
        same_Q, left_Q = self.tied_Q + self.best_Q, np.clip(k - self.above_Q, 0, None)
        none_Q = ways(self.tied_Q, left_Q) / ways(same_Q, np.minimum(left_Q, same_Q))
        return np.where(left_Q > 0, 1 - none_Q, 0.0)


def first_right(
    query_QD: Float[np.ndarray, "Q D"], item_PD: Float[np.ndarray, "P D"], right_Q: Sequence, right_P: Sequence,
    *, alike: bool = False,
) -> Found:  # fmt: skip
    """Where the best right item of each query stands, of queries that have one.

    An item is right where its value of `right` is the query's. With `alike` queries and items are the same samples,
    and a query does not find itself.
    """
    of_Q, of_P = np.asarray(right_Q), np.asarray(right_P)
    parts = []
    for start in range(0, len(of_Q), CHUNK):
        score_qP = query_QD[start : start + CHUNK] @ item_PD.T
        right_qP = of_Q[start : start + CHUNK, None] == of_P
        if alike:
            own = np.arange(len(score_qP)), np.arange(len(score_qP)) + start
            score_qP[own], right_qP[own] = -np.inf, False
        asked_q = right_qP.any(1)
        parts.append(Found.by(score_qP[asked_q], right_qP[asked_q]))
    names = ("above_Q", "tied_Q", "best_Q", "right_Q")
    return Found(*(np.concatenate([getattr(one, name) for one in parts]) for name in names))


def search(
    name: str, query_QD: np.ndarray, item_PD: np.ndarray, right_Q: Sequence, right_P: Sequence, *, alike: bool = False,
    **more,
) -> list[Result]:  # fmt: skip
    """R@1, R@5, R@10, the mean reciprocal rank (MRR) and the median rank of the best right item (counted from 1), with
    what chance gives."""
    if not len(query_QD) or not len(item_PD):
        raise NotMeasured(
            f"{name}: there are {len(query_QD)} queries and {len(item_PD)} items; look at the task's members"
        )
    found = first_right(query_QD, item_PD, right_Q, right_P, alike=alike)
    rank_Q, count_Q, pool = found.rank_Q, found.right_Q, len(item_PD) - alike
    if not len(rank_Q):
        raise NotMeasured(
            f"{name}: none of {len(query_QD)} queries has a right item; look at the task's target and group"
        )
    results = []
    for k in (1, 5, 10):
        if k < pool:
            chance = np.mean([1 - comb(pool - int(n), k) / comb(pool, k) for n in count_Q])
            results.append(mean(f"{name} R@{k}", found.within(k), chance=float(chance), **more))
    by_chance = {n: chance_of_mrr(pool, n) for n in set(count_Q.tolist())}
    expected = float(np.mean([by_chance[n] for n in count_Q.tolist()]))
    results.append(mean(f"{name} MRR", 1 / (rank_Q + 1), chance=expected, **more))
    expected = float(np.median((pool + 1) / (count_Q + 1)))
    results.append(statistic(f"{name} median rank", np.median, rank_Q + 1, chance=expected, less=True, **more))
    return results


def chance_of_mrr(pool: int, right: int) -> float:
    """The mean reciprocal rank of the best of some right items where all orders of the pool are equally likely."""
    before_K = np.arange(pool - right + 1)  # how many wrong ones may come before it
    none_K = np.cumprod([1.0, *((pool - right - before_K) / (pool - before_K))])  # no right one among the first k
    return float((-np.diff(none_K) / (before_K + 1)).sum())
