"""Which tensors of another library's model are which of ours: one table an architecture, read both ways.

A table maps our name to theirs, or to theirs in order where ours is several of theirs on top of one another (queries,
keys and values). `mmpre import` goes from theirs to ours, `mmpre export` from ours to theirs; no bit is changed.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Table = Mapping[str, str | tuple[str, ...]]


def linear(ours: str, *theirs: str) -> Table:
    """Weight and bias of a linear map or a norm."""
    return {f"{ours}.{end}": tuple(f"{one}.{end}" for one in theirs) for end in ("weight", "bias")}


def under(ours: str, theirs: str, table: Table) -> Table:
    """The table of a part, with what both call the part before each name."""
    return {ours + name: tuple(theirs + one for one in _several(some)) for name, some in table.items()}


def to_ours(table: Table, take: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Tensors by our names, where `take` gives one by its name there."""
    return {name: _joined([take(one) for one in _several(some)]) for name, some in table.items()}


def to_theirs(table: Table, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names, from those by ours."""
    found = {}
    for name, some in table.items():
        names = _several(some)
        found |= {one: part.detach() for one, part in zip(names, tensors[name].chunk(len(names)), strict=True)}
    return found


def _several(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
