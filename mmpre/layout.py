"""Where each role's tokens of each row stand in the packed sequence of a batch."""
# B rows, N places, n tokens of one role, P rows put together anew, M tokens asked for

from collections.abc import Mapping
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor


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
        return self.index[role].index_select(0, index_M)  # which, unlike indexing, takes no -1 for the last one

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
