"""Masks over tokens that stand on a grid: blocks, tubes over time, regions that grow.

The field `position` gives each token's place: row and column, or time, row and column.
"""
# N tokens, n ordinary ones, M picked tokens, P 2 or 3 coordinates, T frames, K blocks

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mmpre.draw import Draw
from mmpre.masking.protocol import Mask
from mmpre.masking.rows import one_row
from mmpre.masking.schedule import Share, check_share, share_at
from mmpre.tokens import Ragged, Tokens


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Pick the union of as many blocks as the clip has frames, each placed anywhere in it. Works on one row.

    A block is 1 to T - 1 frames long (1 in a picture), its height and width go from 1 to less than `most` of the
    grid's, all sizes as likely.
    VIOLET's blockwise masking (Fu et al. 2021, arXiv:2111.12681), as in the authors' code: no share is asked for, 15
    percent are picked of 4 frames of 7 x 7 on average and 8 percent of one.
    """

    role: str
    most: float = 2 / 3
    position: str = "position"

    def __post_init__(self) -> None:
        check_share("Blocks", "most", self.most)

    def __call__(self, tokens: Tokens, draw: Draw) -> Int[Tensor, "M"]:
        """Return index_M, sorted; at least one where there is an ordinary token."""
        one_row("Blocks", tokens)
        free_n = (tokens.special_N < 0).nonzero().squeeze(1)
        if not len(free_n):
            return free_n
        place_n3 = places(tokens, self.position)[free_n]
        size_3 = place_n3.amax(0) + 1
        # sizes are drawn from 1 to `above` - 1; 4/3 of 3 rows must not be cut to 3
        above_3 = torch.tensor([int(size_3[0]), *(math.floor(float(s) * self.most + 1e-9) for s in size_3[1:])])
        chance_K23 = torch.rand(int(size_3[0]), 2, 3, generator=draw.rng("blocks"))
        side_K3 = 1 + (chance_K23[:, 0] * (above_3 - 1).clamp(min=1)).long()
        corner_K3 = (chance_K23[:, 1] * (size_3 - side_K3 + 1)).long()
        offset_nK3 = place_n3[:, None] - corner_K3
        return free_n[((offset_nK3 >= 0) & (offset_nK3 < side_K3)).all(2).any(1)]


@dataclass(frozen=True, kw_only=True)
class Tube:
    """Pick the same places in every frame: those that `inside` picks in the clip's first one. Works on one row.

    Video-language models with masked video modelling in VIOLET's manner, such as EVILM, hide tubes.
    """

    role: str
    inside: Mask
    position: str = "position"

    def __call__(self, tokens: Tokens, draw: Draw) -> Int[Tensor, "M"]:
        """Return index_M, sorted."""
        one_row("Tube", tokens)
        free_n = (tokens.special_N < 0).nonzero().squeeze(1)
        if not len(free_n):
            return free_n
        place_n3 = places(tokens, self.position)[free_n]
        first_m2 = place_n3[place_n3[:, 0] == place_n3[0, 0], 1:]
        length = torch.tensor([len(first_m2)])
        frame = Tokens(first_m2.new_full((len(first_m2),), -1), length, {self.position: Ragged(first_m2, length)})
        picked_k2 = first_m2[self.inside(frame, draw)]
        return free_n[(place_n3[:, None, 1:] == picked_k2).all(2).any(1)]


@dataclass(frozen=True, kw_only=True)
class Grown:
    """Pick a region that grows from a random seed, one neighbour at a time, to a share of a row's ordinary tokens.

    `neighbours(tokens)` gives pairs of neighbouring tokens, [E, 2]: `GridNeighbours` or `Edges`. Where no neighbour is
    left, another seed is drawn. The share is rounded; at least one token is picked. Works on one row.
    Regions of a picture hidden with those around them, as InterBERT (Lin et al. 2020, arXiv:2003.13198) does.
    """

    role: str
    share: Share
    neighbours: Callable[[Tokens], Int[Tensor, "E 2"]]

    def __post_init__(self) -> None:
        check_share("Grown", "share", self.share)

    def __call__(self, tokens: Tokens, draw: Draw) -> Int[Tensor, "M"]:
        """Return index_M, sorted."""
        one_row("Grown", tokens)
        free_n = (tokens.special_N < 0).nonzero().squeeze(1)
        near: dict[int, list[int]] = {token: [] for token in free_n.tolist()}
        for a, b in self.neighbours(tokens).tolist():
            if a in near and b in near and a != b:
                near[a].append(b)
                near[b].append(a)
        budget = max(1, round(len(near) * share_at("Grown", "share", self.share, draw.step)))
        rng = draw.rng("grow")
        seeds = free_n[torch.randperm(len(free_n), generator=rng)].tolist()
        chances = torch.rand(budget, generator=rng).tolist()
        picked: dict[int, None] = {}
        frontier: dict[int, None] = {}
        for chance in chances[: len(near)]:
            if not frontier:
                frontier = {next(seed for seed in seeds if seed not in picked): None}
            token = list(frontier)[int(chance * len(frontier))]
            del frontier[token]
            picked[token] = None
            frontier |= dict.fromkeys(other for other in near[token] if other not in picked)
        return torch.tensor(sorted(picked), dtype=torch.int64)


@dataclass(frozen=True)
class GridNeighbours:
    """Tokens whose places differ by one in one coordinate."""

    position: str = "position"

    def __call__(self, tokens: Tokens) -> Int[Tensor, "E 2"]:
        place_N3 = places(tokens, self.position)
        apart_NN = (place_N3[:, None] - place_N3).abs().sum(2)
        return (apart_NN == 1).triu().nonzero()


@dataclass(frozen=True)
class Edges:
    """The pairs of tokens that a field holds."""

    field: str = "edges"

    def __call__(self, tokens: Tokens) -> Int[Tensor, "E 2"]:
        return tokens[self.field]


def places(tokens: Tokens, position: str) -> Int[Tensor, "N 3"]:
    """Time, row and column of each token; the time of a picture is 0."""
    place_NP = tokens[position].long()
    if place_NP.ndim != 2 or place_NP.shape[1] not in (2, 3):
        raise ValueError(
            f"a mask on a grid: field {position!r} must hold (row, column) or (time, row, column) of each token, got "
            f"the shape {list(place_NP.shape)}"
        )
    return torch.nn.functional.pad(place_NP, (3 - place_NP.shape[1], 0))
