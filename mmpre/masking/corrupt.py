"""Corruptions that put something else in a picked token's place, without changing the length."""
# N tokens, M picked tokens

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmpre.draw import Draw, Draws
from mmpre.masking.protocol import Corrupted
from mmpre.masking.units import first_of_unit
from mmpre.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class BertReplace:
    """Of the picked tokens, show the mask for a share, a random id for another, and the token itself for the rest.

    Random ids are drawn from `random_ids` = (first, last + 1). Only masks are marked as replaced: a random id and a
    kept token are meant to be read as they stand. With `unit` (see units.py) all picked tokens of a unit fare alike.
    Source: Devlin et al. 2018, arXiv:1810.04805, section 3.1. ELECTRA's generator (arXiv:2003.10555) keeps 0.15 and
    takes no random id; GPT-BERT (arXiv:2410.24159) decides for whole spans.
    """

    at_once: ClassVar[bool] = True
    mask_id: int
    random_ids: tuple[int, int]
    mask: float = 0.8
    random: float = 0.1
    field: str = "ids"
    unit: str | None = None

    def __post_init__(self) -> None:
        if not (self.mask >= 0 and self.random >= 0 and self.mask + self.random <= 1):
            raise ValueError(
                f"BertReplace: mask and random are shares of the picked tokens with a sum of at most 1, got mask "
                f"{self.mask} and random {self.random}; the rest is kept"
            )
        if not 0 <= self.random_ids[0] < self.random_ids[1]:
            raise ValueError(f"BertReplace: random_ids must be (first, last + 1), got {self.random_ids}")

    def __call__(self, tokens: Tokens, index_M: Int[Tensor, "M"], draw: Draw | Draws) -> Corrupted:
        device = index_M.device
        chance_M = draw.chances(tokens.lengths_B, "replace", device=device).index_select(0, index_M)
        if self.unit is not None:
            chance_M = _alike(chance_M, first_of_unit(tokens, self.unit)[index_M])
        first, end = self.random_ids
        random_M = first + draw.below(end - first, tokens.lengths_B, "random", device=device).index_select(0, index_M)
        ids_N, masked_M = tokens[self.field], chance_M < self.mask
        shown_M = torch.where(chance_M < self.mask + self.random, random_M, ids_N.index_select(0, index_M))
        shown_M = shown_M.masked_fill_(masked_M, self.mask_id).to(ids_N.dtype)
        # index_copy takes a third of the time of an assignment to ids_N[index_M], which every row pays
        replaced_N = torch.zeros(len(tokens), dtype=torch.bool, device=device).index_copy_(0, index_M, masked_M)
        return Corrupted(tokens.with_values(**{self.field: ids_N.index_copy(0, index_M, shown_M)}), replaced_N)


def _alike(chance_M: Float[Tensor, "M"], first_M: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
    """The chance of the first picked token of its unit, for each picked token."""
    starts_M = torch.ones_like(first_M, dtype=torch.bool)
    starts_M[1:] = first_M[1:] != first_M[:-1]
    number_M = torch.arange(len(first_M), device=first_M.device)
    return chance_M[number_M.masked_fill(~starts_M, 0).cummax(0).values] if len(first_M) else chance_M


@dataclass(frozen=True)
class HideAll:
    """Mark every picked token as replaced; its modality shows its mask vector instead."""

    at_once: ClassVar[bool] = True

    def __call__(self, tokens: Tokens, index_M: Int[Tensor, "M"], draw: Draw | Draws) -> Corrupted:
        replaced_N = torch.zeros(len(tokens), dtype=torch.bool, device=index_M.device)
        replaced_N[index_M] = True
        return Corrupted(tokens, replaced_N)
