"""The data order as a function of the position: no permutation array, no shuffle buffer, nothing to save.

A position counts rows from the start of a stage; position // count is the epoch, and the tail of an epoch runs on into
the next. All arithmetic is written out, here and in mmpre/draw.py, and frozen by test vectors, since no library
promises that its random numbers stay the same from version to version.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mmpre.draw import GOLDEN, Key, hashed, mix

# P positions, B rows of a step
_ROUNDS = 12
_MASK = (1 << 64) - 1
_MAX_COUNT = 1 << 60


def permute(index_P: Int[np.ndarray, "P"], count: int, key: int) -> Int[np.ndarray, "P"]:
    """Map indices in [0, count) one to one onto [0, count), chosen by the key.

    A Feistel network on the pair (index mod a, index // a) with a * b just above the count; an image outside the
    range is mapped again until it lies inside (cycle walking). Raises ValueError if an index lies outside [0, count).
    """
    _check_count("permute", count)
    index_P = np.asarray(index_P, dtype=np.int64)
    if index_P.size and not (0 <= index_P.min() and index_P.max() < count):
        raise ValueError(f"permute: indices must lie in [0, {count}), got {index_P.min()} to {index_P.max()}")
    keys_P = np.full(index_P.shape, key & _MASK, dtype=np.uint64)
    return _feistel(index_P, np.full(index_P.shape, count, dtype=np.int64), keys_P)


@dataclass(frozen=True)
class Order:
    """Which unit stands at a position. Every epoch holds every unit exactly once.

    Units are taken in blocks of `block` consecutive ones, so that reads stay near-sequential; the blocks are permuted,
    then the units inside each run of `window` blocks. Where blocks begin shifts from epoch to epoch.
    """

    count: int
    seed: int
    block: int = 8
    window: int = 4096

    def __post_init__(self) -> None:
        _check_count("Order", self.count)
        for name in ("block", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"Order: {name} must be at least 1, got {getattr(self, name)}; 1 turns it off")

    def epoch(self, position: int) -> int:
        return position // self.count

    def units(self, position_P: Int[np.ndarray, "P"]) -> Int[np.ndarray, "P"]:
        """The units at some positions, in their order. Raises ValueError if a position is negative."""
        position_P = np.asarray(position_P, dtype=np.int64)
        if position_P.size and position_P.min() < 0:
            raise ValueError(f"Order: positions count from 0, got {position_P.min()}")
        epoch_P, place_P = np.divmod(position_P, self.count)
        seed_1 = mix(np.array([self.seed & _MASK], dtype=np.uint64))
        seed_P = mix(epoch_P.astype(np.uint64) * np.uint64(GOLDEN) + seed_1)
        # inside windows: the place among the units of a window; the last window may be shorter
        span = min(self.block * self.window, self.count)
        window_P, inside_P = np.divmod(place_P, span)
        size_P = np.minimum(span, self.count - window_P * span)
        inside_P = _feistel(inside_P, size_P, mix(seed_P + window_P.astype(np.uint64) + np.uint64(1)))
        slot_P, offset_P = np.divmod(window_P * span + inside_P, self.block)
        # whole blocks change places; a shorter one stays last, but the shift makes it another one each epoch
        whole = self.count // self.block
        if whole:
            moves_P = slot_P < whole
            size_P = np.full(slot_P.shape, whole, dtype=np.int64)
            moved_P = _feistel(np.where(moves_P, slot_P, 0), size_P, mix(seed_P ^ np.uint64(GOLDEN)))
            slot_P = np.where(moves_P, moved_P, slot_P)
        shift_P = (mix(~seed_P) % np.uint64(self.count)).astype(np.int64)
        return (slot_P * self.block + offset_P + shift_P) % self.count


def donor(position: int, count: int, seed: int, purpose: Key, *, own: int) -> int:
    """Another unit than the row's own, uniform over the others, chosen by hash for a position and a purpose.

    Raises ValueError if there is no other unit.
    """
    if count < 2 or not 0 <= own < count:
        raise ValueError(f"donor: needs another unit than {own} among {count} units; give data of at least 2 samples")
    other = (hashed(seed, "donor", position, purpose) * (count - 1)) >> 63
    return other + (other >= own)


def deal(
    lengths_B: Sequence[int] | np.ndarray | None, micro_batches: int, *, rows: int | None = None
) -> list[np.ndarray]:
    """Deal a step's rows to its micro-batches so that their token counts are even; returns each one's rows, ascending.

    A function of the lengths alone: the longest row first, always to the micro-batch with the fewest tokens (then
    the fewest rows, then the lowest number). Without lengths (None, then `rows` says how many) in turn.
    """
    if micro_batches < 1:
        raise ValueError(f"deal: micro_batches must be at least 1, got {micro_batches}")
    if lengths_B is None:
        if rows is None:
            raise ValueError("deal: without lengths, rows must say how many rows there are")
        return [np.arange(m, rows, micro_batches) for m in range(micro_batches)]
    lengths_B = np.asarray(lengths_B, dtype=np.int64)
    if rows is not None and rows != len(lengths_B):
        raise ValueError(f"deal: {rows} rows but {len(lengths_B)} lengths")
    dealt: list[list[int]] = [[] for _ in range(micro_batches)]
    piles = [(0, 0, m) for m in range(micro_batches)]  # tokens, rows, number: already a heap
    for row in np.argsort(-lengths_B, kind="stable").tolist():
        tokens, held, m = piles[0]
        dealt[m].append(row)
        heapq.heapreplace(piles, (tokens + int(lengths_B[row]), held + 1, m))
    return [np.sort(np.array(part, dtype=np.int64)) for part in dealt]


def _check_count(who: str, count: int) -> None:
    if not 1 <= count <= _MAX_COUNT:
        raise ValueError(f"{who}: count must lie between 1 and 2^60, got {count}")


def _feistel(index_P: np.ndarray, count_P: np.ndarray, key_P: np.ndarray) -> np.ndarray:
    """Permute each index within its own count by its own key."""
    if index_P.size == 0:
        return index_P.copy()
    sides = {count: _sides(count) for count in np.unique(count_P).tolist()}
    low_P, high_P = np.empty(count_P.shape, np.uint64), np.empty(count_P.shape, np.uint64)
    for count, (low, high) in sides.items():
        low_P[count_P == count], high_P[count_P == count] = low, high
    round_keys = [mix(key_P + np.uint64((r + 1) * GOLDEN & _MASK)) for r in range(_ROUNDS)]
    out_P = _pass(index_P.astype(np.uint64), low_P, high_P, round_keys)
    count_P = count_P.astype(np.uint64)
    outside = (out_P >= count_P).nonzero()[0]
    while outside.size:
        keys = [key[outside] for key in round_keys]
        out_P[outside] = _pass(out_P[outside], low_P[outside], high_P[outside], keys)
        outside = outside[out_P[outside] >= count_P[outside]]
    return out_P.astype(np.int64)


def _sides(count: int) -> tuple[int, int]:
    low = max(1, math.isqrt(count - 1) + 1)  # low * high - count < low: walking is rare
    return low, -(-count // low)


def _pass(x_P: np.ndarray, low_P: np.ndarray, high_P: np.ndarray, round_keys: list[np.ndarray]) -> np.ndarray:
    left_P, right_P = x_P % low_P, x_P // low_P
    for r, key_P in enumerate(round_keys):
        if r % 2 == 0:
            left_P = (left_P + mix(right_P ^ key_P) % low_P) % low_P
        else:
            right_P = (right_P + mix(left_P ^ key_P) % high_P) % high_P
    return right_P * low_P + left_P
