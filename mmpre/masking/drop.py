"""Corruptions that change which tokens there are: drop, collapse, insert."""
# N clean tokens, n seen ones, M picked tokens, B rows

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from mmpre.draw import Draw, Draws
from mmpre.masking.protocol import Corrupted
from mmpre.masking.rows import row_numbers
from mmpre.masking.units import first_of_unit
from mmpre.tokens import Ragged, Tokens


@dataclass(frozen=True)
class Drop:
    """Take every picked token away, with its entry in every field; the others keep their order.

    Every field must have one entry a token: what a field of another length means without some tokens is not known
    here. Called on a batch that lies on a device it waits for the device once, to learn the new lengths.
    MAE (He et al. 2021, arXiv:2111.06377).
    """

    at_once: ClassVar[bool] = True

    def __call__(self, tokens: Tokens, index_M: Int[Tensor, "M"], draw: Draw | Draws) -> Corrupted:
        keep_N = torch.ones(len(tokens), dtype=torch.bool, device=index_M.device)
        keep_N[index_M] = False
        index_map = (keep_N.cumsum(0) - 1).masked_fill(~keep_N, -1)
        seen = _of_tokens("Drop", tokens, keep_N.nonzero().squeeze(1), renumber=None)
        return Corrupted(seen, torch.zeros(len(seen), dtype=torch.bool, device=index_M.device), index_map)


@dataclass(frozen=True)
class Collapse:
    """Show one replaced token for each unit (see units.py) of which tokens are picked; the row becomes shorter.

    Without `unit`, neighbouring picked tokens become one. The field `renumber`, where there is one, counts the seen
    tokens of a row from 0 again: a gap would tell how many are hidden. All tokens of a unit are mapped to its one
    seen token, and the pick "PICK.units" has it once, with the first of its clean tokens.
    ERNIE-Gram (Xiao et al. 2020, arXiv:2010.12148) predicts an n-gram from a single mask.
    """

    at_once: ClassVar[bool] = True
    unit: str | None = None
    renumber: str | None = "position"

    def __call__(self, tokens: Tokens, index_M: Int[Tensor, "M"], draw: Draw | Draws) -> Corrupted:
        picked_N = torch.zeros(len(tokens), dtype=torch.bool, device=index_M.device)
        picked_N[index_M] = True
        group_N = row_numbers(tokens) if self.unit is None else first_of_unit(tokens, self.unit)
        goes_on_N = torch.zeros_like(picked_N)
        goes_on_N[1:] = picked_N[1:] & picked_N[:-1] & (group_N[1:] == group_N[:-1])
        kept_n = (~goes_on_N).nonzero().squeeze(1)
        index_map = (~goes_on_N).cumsum(0) - 1
        seen = _of_tokens("Collapse", tokens, kept_n, renumber=self.renumber)
        unit_M = index_M[~goes_on_N[index_M]]
        return Corrupted(seen, picked_N[kept_n], index_map, {"units": (unit_M, index_map[unit_M])})


@dataclass(frozen=True)
class Insert:
    """Put one replaced token before each picked one; the row becomes longer, and no token is hidden.

    The field `renumber`, where there is one, counts the seen tokens of a row from 0 again. The pick "PICK.inserted"
    has the new tokens, with the clean token that each stands before: it has no content of its own.
    Multi-perspective contrast of replaced, swapped and inserted tokens (MCL) builds on it.
    """

    at_once: ClassVar[bool] = True
    renumber: str | None = "position"

    def __call__(self, tokens: Tokens, index_M: Int[Tensor, "M"], draw: Draw | Draws) -> Corrupted:
        times_N = torch.ones(len(tokens), dtype=torch.int64, device=index_M.device)
        times_N[index_M] = 2
        source_n = torch.repeat_interleave(torch.arange(len(tokens), device=index_M.device), times_N)
        index_map = times_N.cumsum(0) - 1
        seen = _of_tokens("Insert", tokens, source_n, renumber=self.renumber)
        new_M = index_map[index_M] - 1
        replaced_n = torch.zeros(len(seen), dtype=torch.bool, device=index_M.device)
        replaced_n[new_M] = True
        return Corrupted(seen, replaced_n, index_map, {"inserted": (index_M, new_M)})


def _of_tokens(who: str, tokens: Tokens, source_n: Int[Tensor, "n"], *, renumber: str | None) -> Tokens:
    """Tokens made of the given ones, row after row, with their entry in every field."""
    for name, one in tokens.fields.items():
        if one.refers_to or not torch.equal(one.lengths_B, tokens.lengths_B):
            raise ValueError(
                f"{who}: every field needs one entry a token and no references, got {name!r} with "
                f"{int(one.lengths_B.sum())} entries for {len(tokens)} tokens"
                + (f", referring to {one.refers_to!r}" if one.refers_to else "")
                + "; hide such tokens with HideAll instead, or write a corruption for this modality"
            )
    row_n = row_numbers(tokens).index_select(0, source_n)
    if len(tokens.lengths_B) == 1:
        lengths_B = torch.tensor([len(source_n)])
    else:
        lengths_B = torch.bincount(row_n, minlength=len(tokens.lengths_B)).cpu()
    # not values[source_n], which is slower on wide fields
    fields = {name: Ragged(one.values.index_select(0, source_n), lengths_B) for name, one in tokens.fields.items()}
    if renumber in fields:
        start_B = (lengths_B.cumsum(0) - lengths_B).to(row_n.device)
        count_n = torch.arange(len(row_n), device=row_n.device) - start_B[row_n]
        if fields[renumber].values.ndim != 1:
            raise ValueError(f"{who}: field {renumber!r} holds no running number; give renumber=None to leave it")
        fields[renumber] = Ragged(count_n.to(fields[renumber].values.dtype), lengths_B)
    return Tokens(tokens.special_N[source_n], lengths_B, fields)
