"""The packed batch: rows as a view makes them, laid end to end without padding, and what a mask picked of them."""
# B rows, n tokens of a row or role, M picked tokens

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmpre.absent import Absent
from mmpre.layout import Layout
from mmpre.tokens import Tokens


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
            raise Absent(f"Views: no view {name!r}; the task makes {sorted(self.views)}")
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
    for what, names in (("picks", [set(row.picked) for row in rows]), ("labels", [set(row.labels) for row in rows])):
        if odd := set.union(*names) - set.intersection(*names):
            raise ValueError(
                f"pack: rows of one micro-batch must have the same {what}, some alone have {', '.join(sorted(odd))}; "
                "let all views of the task make them"
            )
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
