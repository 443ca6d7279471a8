"""Tokens of one modality, their places in the packed sequence of a batch, and the batch itself.

A batch has no padding: all tokens of all its rows lie end to end. A row holds the tokens of every role (text, image,
...) one after the other; a `Layout` says where.
"""
# B rows, N tokens, M picked tokens, R roles

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor


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
            raise KeyError(f"Tokens: no field {name!r}; this modality's reader made {sorted(self.fields)}")
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


class Layout:
    """Where each role's tokens of each row stand in the packed sequence.

    A row is the tokens of its roles, in the order of `roles`; a role may have no token in a row. Lengths live on the
    CPU; index tensors are made when first asked for and move with `to`.
    """

    def __init__(self, lengths: Mapping[str, Int[Tensor, "B"]], device: torch.device | str = "cpu") -> None:
        self.roles = tuple(lengths)
        self.lengths = dict(lengths)
        self.device = torch.device(device)
        self.lengths_B: Int[Tensor, "B"] = torch.stack(list(lengths.values())).sum(0)
        self.size = int(self.lengths_B.sum())

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.lengths_B)

    @cached_property
    def starts_B(self) -> Int[Tensor, "B"]:
        return self.lengths_B.cumsum(0) - self.lengths_B

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """Runs of neighbouring rows of equal length, as (rows, length); few where rows are sorted by length."""
        lengths, counts = torch.unique_consecutive(self.lengths_B, return_counts=True)
        return list(zip(counts.tolist(), lengths.tolist(), strict=True))

    @cached_property
    def first_by_role(self) -> dict[str, Int[Tensor, "B"]]:
        """The place of each role's first token in each row (where it would be, for a role without tokens)."""
        return {role: start_B.to(self.device) for role, start_B in self._first.items()}

    @cached_property
    def _first(self) -> dict[str, Int[Tensor, "B"]]:
        """The same where lengths are, on the CPU."""
        start_B, first = self.starts_B, {}
        for role in self.roles:
            first[role] = start_B
            start_B = start_B + self.lengths[role]
        return first

    @cached_property
    def index(self) -> dict[str, Int[Tensor, "n"]]:
        """For each role, the places of its tokens, row after row."""
        places = {}
        for role in self.roles:
            length_B = self.lengths[role]
            count = int(length_B.sum())
            before_B = length_B.cumsum(0) - length_B
            shift_B = self._first[role] - before_B
            shift_N = torch.repeat_interleave(shift_B, length_B, output_size=count)
            places[role] = (torch.arange(count) + shift_N).to(self.device)
        return places

    @cached_property
    def source_N(self) -> Int[Tensor, "N"] | None:
        """For each place, its number in the roles' tokens laid one role after the other; None for a single role."""
        if len(self.roles) == 1:
            return None
        place_N = torch.cat([self.index[role] for role in self.roles])
        source_N = torch.empty_like(place_N)
        source_N[place_N] = torch.arange(self.size, device=self.device)
        return source_N

    def pair(self, rows: Mapping[str, Int[Tensor, "P"]]) -> tuple["Layout", Int[Tensor, "n"], Int[Tensor, "P"]]:
        """Rows put together anew: for each role, from which row its tokens are taken, one number a new row.

        Returns the new layout, whose rows are sorted by length; for each of its places the place here whose vector
        stands there; and the number of each new row among those asked for.
        """
        lengths = {role: self.lengths[role][row_P.cpu()] for role, row_P in rows.items()}
        order_P = torch.stack(list(lengths.values())).sum(0).argsort(stable=True)
        made = Layout({role: length_P[order_P] for role, length_P in lengths.items()})
        place_n = torch.empty(made.size, dtype=torch.int64)  # made on the CPU: no device is waited for
        for role, row_P in rows.items():
            length_P, count = made.lengths[role], len(made.index[role])
            first_P = self._first[role][row_P.cpu()[order_P]]
            step_n = torch.arange(count) - torch.repeat_interleave(length_P.cumsum(0) - length_P, length_P)
            source_n = torch.repeat_interleave(first_P, length_P, output_size=count) + step_n
            place_n[made.index[role]] = source_n
        return made.to(self.device), place_n.to(self.device), order_P.to(self.device)

    @cached_property
    def row_N(self) -> Int[Tensor, "N"]:
        """The row of each place."""
        rows_N = torch.repeat_interleave(torch.arange(len(self)), self.lengths_B, output_size=self.size)
        return rows_N.to(self.device)

    def only(self, role: str) -> "Layout":
        """The layout of one role's tokens of the same rows, laid end to end; made once."""
        made: dict[str, Layout] = self.__dict__.setdefault("made", {})
        if role not in made:
            made[role] = Layout({role: self.lengths[role]}, self.device)
        return made[role]

    def first(self, role: str) -> Int[Tensor, "B"]:
        """The places of each row's first token of a role, such as [CLS]."""
        if (self.lengths[role] == 0).any():
            row = int((self.lengths[role] == 0).nonzero()[0])
            raise ValueError(f"Layout.first: row {row} has no token of role {role!r}; every row needs one here")
        return self.first_by_role[role]

    def at(self, role: str, index_M: Int[Tensor, "M"]) -> Int[Tensor, "M"]:
        """The places of a role's tokens that are given by their number among the role's tokens."""
        return self.index[role][index_M]

    def to(self, device: torch.device | str) -> "Layout":
        """The same layout with its index tensors on a device; what was made already is moved, not made again."""
        if torch.device(device) == self.device:
            return self
        moved = Layout(self.lengths, device)
        for name in ("index", "first_by_role"):
            if name in self.__dict__:
                made = {role: t.to(device, non_blocking=True) for role, t in self.__dict__[name].items()}
                moved.__dict__[name] = made
        for name in ("source_N", "row_N"):
            if self.__dict__.get(name) is not None:
                moved.__dict__[name] = self.__dict__[name].to(device, non_blocking=True)
        return moved


@dataclass(frozen=True)
class Picked:
    """What a mask picked from one role: numbers of its tokens, among the clean ones and among those that are seen.

    `seen_M` differs from `clean_M` where a corruption drops or inserts tokens; it is -1 for a dropped token.
    """

    role: str
    clean_M: Int[Tensor, "M"]
    seen_M: Int[Tensor, "M"]

    def __len__(self) -> int:
        return len(self.clean_M)

    def split(self, clean_B: Int[Tensor, "B"], seen_B: Int[Tensor, "B"]) -> list["Picked"]:
        """The picks of each row of a batch, sorted as they are, given how many clean and seen tokens each row has."""
        end_B = clean_B.cumsum(0)
        until_B = torch.searchsorted(self.clean_M, end_B)
        counts_B = until_B.diff(prepend=until_B.new_zeros(1))
        start_M, seen_start_M = (
            torch.repeat_interleave(x, counts_B) for x in (end_B - clean_B, seen_B.cumsum(0) - seen_B)
        )
        counts = counts_B.tolist()
        clean = (self.clean_M - start_M).split(counts)
        seen = torch.where(self.seen_M < 0, self.seen_M, self.seen_M - seen_start_M).split(counts)
        return [Picked(self.role, *places) for places in zip(clean, seen, strict=True)]


@dataclass(frozen=True)
class Row:
    """One row as a view makes it, in a loading worker."""

    key: str
    clean: Mapping[str, Tokens]
    seen: Mapping[str, Tokens]
    replaced: Mapping[str, Bool[Tensor, "n"]]
    picked: Mapping[str, Picked]
    labels: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return sum(len(tokens) for tokens in self.seen.values())


@dataclass(frozen=True)
class Batch:
    """A micro-batch: rows sorted by length, laid end to end; `order_B` has the number of each among those given.

    `clean` holds the tokens that targets are read from, `seen` what the encoder may see, `replaced` which of the
    seen tokens stand for a hidden one. `labels` has a value per row. `counts` are what losses are divided by: rows,
    tokens (those seen), for each pick picked:NAME, the tokens it took, and ordinary:NAME, those it chose from, and for
    each label that is a number labelled:NAME, the rows in which it is not below 0.
    A row whose sample could not be read is missing from all of these.
    """

    clean: Mapping[str, Tokens]
    seen: Mapping[str, Tokens]
    replaced: Mapping[str, Bool[Tensor, "n"]]
    picked: Mapping[str, Picked]
    labels: Mapping[str, Tensor]
    layout: Layout
    plan: Any
    keys: Sequence[str]
    counts: Mapping[str, int]
    order_B: Int[Tensor, "B"]

    def given(self, x_B: Tensor) -> Tensor:
        """Values of the rows, in the order in which the rows were given: the same for all views of a micro-batch."""
        return torch.empty_like(x_B).index_copy(0, self.order_B, x_B)

    def to(self, device: torch.device | str) -> "Batch":
        def moved(tokens: Mapping[str, Tokens]) -> dict[str, Tokens]:
            return {role: one.to(device) for role, one in tokens.items()}

        def over(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: one.to(device, non_blocking=True) for name, one in tensors.items()}

        picked = {
            name: Picked(p.role, *(i.to(device, non_blocking=True) for i in (p.clean_M, p.seen_M)))
            for name, p in self.picked.items()
        }
        return replace(
            self, clean=moved(self.clean), seen=moved(self.seen), replaced=over(self.replaced), picked=picked,
            labels=over(self.labels), layout=self.layout.to(device),
            plan=None if self.plan is None else self.plan.to(device),
            order_B=self.order_B.to(device, non_blocking=True),
        )  # fmt: skip


@dataclass(frozen=True)
class Views:
    """The batches of a task with several views, by name: the same samples, each view sorted by lengths of its own."""

    views: Mapping[str, Batch]

    def __getitem__(self, name: str) -> Batch:
        if name not in self.views:
            raise KeyError(f"Views: no view {name!r}; the task makes {sorted(self.views)}")
        return self.views[name]

    @property
    def keys(self) -> Sequence[str]:
        return next(iter(self.views.values())).keys

    @property
    def counts(self) -> Mapping[str, int]:
        """Rows are counted once, tokens and picks over all views."""
        total: dict[str, int] = {}
        for batch in self.views.values():
            for name, count in batch.counts.items():
                total[name] = count if name == "rows" else total.get(name, 0) + count
        return total

    def to(self, device: torch.device | str) -> "Views":
        return Views({name: batch.to(device) for name, batch in self.views.items()})


def pack(rows: Sequence[Row], plan_of: Callable[[Layout, Batch], Any]) -> Batch:
    """Lay rows end to end, shortest first (equal lengths lie together, which attention uses).

    Among those of equal length, rows with fewer clean tokens come first, for a decoder over all tokens of a row.
    `plan_of(layout, batch)` makes what attention needs to know (`Attend.plan`) from the batch that still lacks it.
    Rows equal in both lengths keep their order, so the same rows always give the same batch.
    """
    lengths = [(row.length, sum(len(tokens) for tokens in row.clean.values())) for row in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    rows = [rows[i] for i in order]
    roles = list(rows[0].seen)
    check_alike(rows, roles)
    clean = {role: Tokens.pack([row.clean[role] for row in rows]) for role in roles}
    seen = {role: Tokens.pack([row.seen[role] for row in rows]) for role in roles}
    layout = Layout({role: seen[role].lengths_B for role in roles})
    _ = layout.index, layout.source_N  # made here, in the worker, not on the device
    picked = {name: _pack_picked([row.picked[name] for row in rows], clean, seen) for name in rows[0].picked}
    counts = {"rows": len(rows), "tokens": layout.size}
    for name, one in picked.items():
        counts |= {f"picked:{name}": len(one), f"ordinary:{name}": int((clean[one.role].special_N < 0).sum())}
    labels = {name: torch.stack([row.labels[name] for row in rows]) for name in rows[0].labels}
    counts |= {f"labelled:{name}": int((one_B >= 0).sum()) for name, one_B in labels.items() if one_B.ndim == 1}
    batch = Batch(
        clean=clean, seen=seen, picked=picked, layout=layout, plan=None, counts=counts,
        replaced={role: torch.cat([row.replaced[role] for row in rows]) for role in roles},
        labels=labels,
        keys=[row.key for row in rows], order_B=torch.tensor(order),
    )  # fmt: skip
    return replace(batch, plan=plan_of(layout, batch))


def check_alike(rows: Sequence[Any], roles: Sequence[str]) -> None:
    """Rows of a batch need fields of one type and shape, but for the first dimension."""

    def kinds(row: Row, role: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return {name: (one.values.dtype, one.values.shape[1:]) for name, one in row.clean[role].fields.items()}

    def told(row: Row, role: str) -> dict[str, str]:
        return {
            name: f"{kind} [*{''.join(f', {n}' for n in shape)}]" for name, (kind, shape) in kinds(row, role).items()
        }

    for role in roles:
        first = kinds(rows[0], role)
        for row in rows[1:]:
            if kinds(row, role) != first:
                came, wanted = told(row, role), told(rows[0], role)
                raise ValueError(
                    f"role {role!r}: its reader made {came} of sample {row.key!r} and {wanted} of sample "
                    f"{rows[0].key!r}; all rows of a batch need the same fields, of one type and shape"
                )


def _pack_picked(picks: Sequence[Picked], clean: Mapping[str, Tokens], seen: Mapping[str, Tokens]) -> Picked:
    role = picks[0].role
    counts_B = torch.tensor([len(pick) for pick in picks])

    def shifted(parts: Sequence[Tensor], lengths_B: Tensor) -> Tensor:
        start_B = lengths_B.cumsum(0) - lengths_B
        index_M = torch.cat(list(parts))
        return torch.where(index_M < 0, index_M, index_M + torch.repeat_interleave(start_B, counts_B))

    return Picked(
        role,
        shifted([pick.clean_M for pick in picks], clean[role].lengths_B),
        shifted([pick.seen_M for pick in picks], seen[role].lengths_B),
    )
