"""Rows, clips and batches for the tests of masks and corruptions."""

import torch

from mmpre.draw import Draw
from mmpre.tokens import Tokens

ROWS = 10_000


def row(unit, epoch=0, step=0):
    return Draw.row(3, 0, step, epoch=epoch, unit=unit)


def some_tokens(length, special=(0, -1), **fields):
    """Ids 100 to 199, with CLS at one place and SEP at another."""
    special_N = torch.full((length,), -1)
    for kind, place in enumerate(special):
        special_N[place] = kind
    return Tokens.of_row(special_N, ids=100 + torch.arange(length) % 100, position=torch.arange(length), **fields)


def words(*sizes):
    """[CLS], words of so many pieces, [SEP]."""
    word = [-1, *(i for i, size in enumerate(sizes) for _ in range(size)), -1]
    return some_tokens(len(word), word=torch.tensor(word))


def clip(*shape):
    """A grid of frames, rows and columns (or rows and columns), behind a [CLS] whose place is 0."""
    place = torch.cartesian_prod(*(torch.arange(side) for side in shape))
    place = torch.cat([torch.zeros_like(place[:1]), place])
    special_N = torch.full((len(place),), -1)
    special_N[0] = 0
    return Tokens.of_row(special_N, position=place, patch=torch.arange(len(place)))


def packed(tokens, rows):
    """One row many times, as a batch."""
    return Tokens.pack([tokens] * rows)


def rates(mask, tokens, rows=ROWS):
    """How often each token is picked, over many units; every pick is sorted and without special tokens."""
    times_N = torch.zeros(len(tokens))
    for unit in range(rows):
        index_M = mask(tokens, row(unit))
        assert (index_M.diff() > 0).all()
        times_N[index_M] += 1
    assert times_N[tokens.special_N >= 0].sum() == 0
    return times_N / rows


def per_row(index_M, tokens):
    """How many tokens of each row of a batch are picked."""
    row_N = torch.repeat_interleave(torch.arange(len(tokens.lengths_B)), tokens.lengths_B)
    return torch.bincount(row_N[index_M], minlength=len(tokens.lengths_B))
