"""Retrieval by vectors: for each query, which items are nearest? Exact, some queries at a time."""
# Q queries, P items, D width

from collections.abc import Sequence
from math import comb

import numpy as np
from jaxtyping import Float, Int

from mmpre.evaluation.results import NotMeasured, Result, mean, statistic

CHUNK = 512  # queries at a time


def first_right(
    query_QD: Float[np.ndarray, "Q D"], item_PD: Float[np.ndarray, "P D"], right_Q: Sequence, right_P: Sequence,
    *, alike: bool = False,
) -> tuple[Int[np.ndarray, "Q"], Int[np.ndarray, "Q"]]:  # fmt: skip
    """How many items score higher than each query's best right one (ties count half), and how many are right.

    An item is right where its value of `right` is the query's. With `alike` queries and items are the same samples,
    and a query does not find itself. A rank is -1 where nothing is right.
    """
    of_Q, of_P = np.asarray(right_Q), np.asarray(right_P)
    rank_Q, count_Q = np.empty(len(of_Q)), np.empty(len(of_Q), dtype=np.int64)
    for start in range(0, len(of_Q), CHUNK):
        score_qP = query_QD[start : start + CHUNK] @ item_PD.T
        right_qP = of_Q[start : start + CHUNK, None] == of_P
        if alike:
            own = np.arange(len(score_qP)), np.arange(len(score_qP)) + start
            score_qP[own], right_qP[own] = -np.inf, False
        best_q = np.where(right_qP, score_qP, -np.inf).max(1, keepdims=True)
        above_q = ((score_qP > best_q) & ~right_qP).sum(1) + ((score_qP == best_q) & ~right_qP).sum(1) / 2
        count_q = right_qP.sum(1)
        rank_Q[start : start + CHUNK] = np.where(count_q > 0, above_q, -1)
        count_Q[start : start + CHUNK] = count_q
    return rank_Q, count_Q


def search(
    name: str, query_QD: np.ndarray, item_PD: np.ndarray, right_Q: Sequence, right_P: Sequence, *, alike: bool = False,
    **more,
) -> list[Result]:  # fmt: skip
    """R@1, R@5, R@10, the mean reciprocal rank (MRR) and the median rank of the best right item (counted from 1), with
    what chance gives."""
    rank_Q, count_Q = first_right(query_QD, item_PD, right_Q, right_P, alike=alike)
    asked = rank_Q >= 0
    if not asked.any():
        raise NotMeasured(f"{name}: none of {len(asked)} queries has a right item; look at the task's target and group")
    rank_Q, count_Q, pool = rank_Q[asked], count_Q[asked], len(item_PD) - alike
    results = []
    for k in (1, 5, 10):
        if k < pool:
            chance = np.mean([1 - comb(pool - int(n), k) / comb(pool, k) for n in count_Q])
            results.append(mean(f"{name} R@{k}", rank_Q < k, chance=float(chance), **more))
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
