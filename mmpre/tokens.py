"""Tokens of one modality, of one row or of a whole batch laid end to end."""
# B rows, N tokens

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from mmpre.absent import Absent


@dataclass(frozen=True)
class Ragged:
    """Values of B rows end to end; `lengths_B` says how many each row has.

    Where `refers_to` names another field (or "tokens", the model tokens), the values are indices into it, counted
    from the row's start; packing shifts them so that they stay right.
    """

    values: Tensor
    lengths_B: Int[Tensor, "B"]
    refers_to: str | None = None


@lru_cache(maxsize=4096)
def _one_length(length: int) -> Int[Tensor, "1"]:
    """A row's `lengths_B`, shared by all rows of that length: making it anew took a tenth of a short row's time."""
    return torch.tensor([length])


@dataclass(frozen=True)
class Tokens:
    """The tokens of one modality, of one row (as a reader makes them) or of a whole batch.

    `special_N` is below 0 for ordinary tokens and says which kind of special token the others are (CLS, SEP,
    registers ...): masks never pick those. Every other field has a name and may have a length of its own.
    """

    special_N: Int[Tensor, "N"]
    lengths_B: Int[Tensor, "B"]
    fields: Mapping[str, Ragged]

    @staticmethod
    def of_row(special_N: Int[Tensor, "N"], **fields: Tensor | Ragged) -> "Tokens":
        """Make a row's tokens; a plain tensor has its length in its first dimension."""
        full = {
            name: value if isinstance(value, Ragged) else Ragged(value, _one_length(value.shape[0]))
            for name, value in fields.items()
        }
        return Tokens(special_N, _one_length(special_N.shape[0]), full)

    @staticmethod
    def pack(rows: Sequence["Tokens"]) -> "Tokens":
        """Lay rows end to end; they must have the same fields."""
        first = rows[0]
        for row in rows:
            if row.fields.keys() != first.fields.keys():
                raise ValueError(
                    f"Tokens.pack: all rows of a batch need the same fields, got {sorted(first.fields)} and "
                    f"{sorted(row.fields)}; a reader must return the same fields for every sample"
                )
        fields = {}
        for name, one in first.fields.items():
            parts = [row.fields[name] for row in rows]
            values = [part.values for part in parts]
            if one.refers_to:
                sizes = [row._length_of(one.refers_to) for row in rows]
                starts = torch.tensor([0, *sizes[:-1]]).cumsum(0).tolist()
                values = [value + start for value, start in zip(values, starts, strict=True)]
            fields[name] = Ragged(torch.cat(values), torch.cat([part.lengths_B for part in parts]), one.refers_to)
        return Tokens(torch.cat([row.special_N for row in rows]), torch.cat([row.lengths_B for row in rows]), fields)

    def split(self) -> list["Tokens"]:
        """The rows of a batch, each for itself: what `pack` was given."""
        lengths = self.lengths_B.tolist()
        fields = [[] for _ in lengths]
        for name, one in self.fields.items():
            sizes = one.lengths_B.tolist()
            values = one.values.split(sizes)
            if one.refers_to:
                of_B = self.lengths_B if one.refers_to == "tokens" else self.fields[one.refers_to].lengths_B
                starts = (of_B.cumsum(0) - of_B).tolist()
                values = [value - start for value, start in zip(values, starts, strict=True)]
            for row, value, size in zip(fields, values, sizes, strict=True):
                row.append((name, Ragged(value, _one_length(size), one.refers_to)))
        specials = self.special_N.split(lengths)
        return [
            Tokens(special_N, _one_length(length), dict(row))
            for special_N, length, row in zip(specials, lengths, fields, strict=True)
        ]

    def __len__(self) -> int:
        return self.special_N.shape[0]  # a tenth of the time of the tensor's own len

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.fields:
            raise Absent(f"Tokens: no field {name!r}; this modality's reader made {sorted(self.fields)}")
        return self.fields[name].values

    def with_values(self, **values: Tensor) -> "Tokens":
        """The same tokens with other values in some fields, such as corrupted ids."""
        fields = dict(self.fields)
        for name, value in values.items():
            fields[name] = Ragged(value, fields[name].lengths_B, fields[name].refers_to)
        return Tokens(self.special_N, self.lengths_B, fields)

    def to(self, device: torch.device | str) -> "Tokens":
        """Move to a device; lengths stay where they are made, so that planning never waits for the device."""
        fields = {name: replace(f, values=f.values.to(device, non_blocking=True)) for name, f in self.fields.items()}
        return replace(self, special_N=self.special_N.to(device, non_blocking=True), fields=fields)

    def _length_of(self, name: str) -> int:
        return len(self) if name == "tokens" else int(self.fields[name].lengths_B.sum())
