"""What the tokens before one tell of it, by counts: what a network that reads a whole row should be above."""
# R rows, n tokens of a row, m of them asked for, W windows, C contexts, V ids

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int


def markov(
    ids: Sequence[Int[np.ndarray, "n"]], asked: Sequence[Int[np.ndarray, "m"]], order: int
) -> Float[np.ndarray, "R"]:
    """The share of each row's asked places whose id is the likeliest after the `order` ids before it.

    Likeliest by counts of all other rows, so that nothing is fitted on the row itself; the commonest id where a context
    was not seen there, or is cut off by the row's beginning. The ids before are those of the row, hidden or not.
    """
    value_V, id_N = np.unique(np.concatenate(ids), return_inverse=True)
    rows = np.split(id_N, np.cumsum([len(one) for one in ids])[:-1])
    window_WO = np.concatenate([_windows(one, order) for one in rows])
    of_W = np.repeat(np.arange(len(rows)), [max(0, len(one) - order) for one in rows])
    _, context_W = np.unique(window_WO[:, :-1], axis=0, return_inverse=True)
    context_W = context_W.reshape(-1)  # some versions of numpy keep the second axis
    count_CV = np.zeros((context_W.max(initial=-1) + 1, len(value_V)), dtype=np.int64)
    np.add.at(count_CV, (context_W, window_WO[:, -1]), 1)
    count_V, share_R = np.bincount(id_N, minlength=len(value_V)), np.zeros(len(rows))
    begun_R = np.searchsorted(of_W, np.arange(len(rows)))
    for i, (row_n, asked_m) in enumerate(zip(rows, asked, strict=True)):
        mine_W = slice(begun_R[i], begun_R[i] + max(0, len(row_n) - order))
        context_n, last_n = context_W[mine_W], window_WO[mine_W, -1]
        guess_m = np.full(len(asked_m), (count_V - np.bincount(row_n, minlength=len(count_V))).argmax())
        for j, place in enumerate(asked_m):
            if place >= order:
                own = last_n[context_n == context_n[place - order]]
                others_V = count_CV[context_n[place - order]] - np.bincount(own, minlength=len(count_V))
                guess_m[j] = others_V.argmax() if others_V.any() else guess_m[j]
        share_R[i] = np.mean(guess_m == row_n[asked_m]) if len(asked_m) else 0.0
    return share_R


def _windows(row_n: Int[np.ndarray, "n"], order: int) -> Int[np.ndarray, "W O"]:
    if len(row_n) <= order:
        return np.empty((0, order + 1), dtype=row_n.dtype)
    return np.lib.stride_tricks.sliding_window_view(row_n, order + 1)
