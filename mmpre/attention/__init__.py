"""Who may attend to whom in a packed batch.

An `Attend` says it; its `plan(layout, batch)` is made in the loading worker and holds what the backends of
backends.py need to know. Those that ask the rows' tokens are in by_tokens.py.
"""
# B rows, N tokens of the packed batch, M tokens of a sequence that they read, n and m those of one row

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from mmpre.attention.explicit import Order, Runs
from mmpre.attention.rules import CAUSAL, EVERYONE, Band, Both, Rule, Subset
from mmpre.batch import Batch
from mmpre.layout import Layout

CPU = torch.device("cpu")
Made = TypeVar("Made")


@runtime_checkable
class Attend(Protocol):
    """Who may attend to whom; picklable."""

    def plan(self, layout: Layout, batch: Batch | None = None) -> "Plan":
        """Plan for the rows of a layout. `batch`, still without a plan, is there for those who ask its tokens,
        labels or picks; None where only lengths are known."""
        ...


@dataclass(frozen=True)
class Memory:
    """States of another sequence of the same rows, for cross-attention, and the plan by which tokens read them."""

    state_MD: Float[Tensor, "M D"]
    plan: "Plan"


@dataclass(frozen=True, eq=False)
class Plan:
    """An Attend for the rows of one batch. What a backend wants beyond lengths is made when first asked for.

    Layouts serve for their lengths alone and stay on the CPU, so planning never waits for a device. `keys` is the
    layout of what is read, where that is another sequence of the same rows. `given_N` are the tokens' positions, where
    they are not their places in the row. `counts_M` says as how many tokens each of those read counts, where tokens
    were merged: the logarithm is added to the scores (proportional attention, Bolya et al. 2022, arXiv:2210.09461).
    `layers` holds a plan for each layer, where layers differ.
    """

    layout: Layout
    rule: Rule = EVERYONE
    keys: Layout | None = None
    given_N: Int[Tensor, "N"] | None = None
    counts_M: Float[Tensor, "M"] | None = None
    layers: tuple["Plan", ...] = ()
    memory: Memory | None = None
    device: torch.device = CPU

    def __post_init__(self) -> None:
        _ = self.groups  # made here, in the worker

    def to(self, device: torch.device | str) -> Self:
        device = torch.device(device)
        return self if device == self.device else _moved(self, device)

    def of_layer(self, i: int, depth: int) -> "Plan":
        """The plan of the i-th of `depth` layers."""
        if not self.layers:
            return self
        if len(self.layers) != depth:
            raise ValueError(
                f"Layers: needs an attend for each of the encoder's {depth} layers, got {len(self.layers)}"
            )
        return self.layers[i]

    def also(self, attend: Attend | None) -> "Plan":
        """This plan where another attend allows it too, one that asks lengths alone; made once a batch."""
        if attend is None:
            return self
        made: dict[int, tuple[Attend, Plan]] = self.__dict__.setdefault("made_also", {})
        if id(attend) not in made:  # an attend that is kept keeps its id
            other = attend.plan(self.layout).to(self.device)
            if other.layers or other.given_N is not None:
                raise ValueError("Plan.also: wanted an attend of lengths alone, the same in all layers; use Together")
            rule = Both.of(self.rule, other.rule)
            made[id(attend)] = attend, replace(self, rule=rule)
        return made[id(attend)][1]

    def only(self, role: str, layout: Layout) -> "Plan":
        """This plan for one role's tokens of the layout it was made for, as if there were no others; made once."""
        made: dict[str, Plan] = self.__dict__.setdefault("made_only", {})
        if role not in made:
            place_n, memory = layout.index[role], self.memory
            given_n, count_n = (None if one is None else one[place_n] for one in (self.given_N, self.counts_M))
            if memory is not None:
                memory = Memory(memory.state_MD, replace(memory.plan, layout=layout.only(role)))
            rule = self.rule if isinstance(self.rule, Band) else Subset(self.rule, place_n)
            made[role] = replace(
                self, layout=layout.only(role), rule=rule, given_N=given_n, counts_M=count_n, memory=memory
            )
        return made[role]

    def reading(self, state_MD: Float[Tensor, "M D"], layout: Layout) -> "Plan":
        """This plan, with states of another sequence of the same rows for cross-attention; all of a row's are read."""
        if len(layout) != len(self.layout):
            raise ValueError(f"Plan.reading: wanted states of the same {len(self.layout)} rows, got {len(layout)} rows")
        memory = Memory(state_MD, Plan(self.layout, keys=layout, device=self.device))
        return replace(self, memory=memory, layers=tuple(replace(one, memory=memory) for one in self.layers))

    def dense(self, row: int) -> Bool[Tensor, "n m"]:
        """True where a token of the row (first axis) may attend to another one (second axis)."""
        q_n, k_m = (
            int(layout.starts_B[row]) + torch.arange(int(layout.lengths_B[row]), device=self.device)
            for layout in (self.layout, self.read)
        )
        return self.rule(q_n[:, None], k_m[None])

    @property
    def read(self) -> Layout:
        """The layout of the tokens that are read."""
        return self.layout if self.keys is None else self.keys

    @cached_property
    def groups(self) -> list[tuple[int, int, int]]:
        """Runs of neighbouring rows of equal lengths, as (rows, n, m), without rows that have no token."""
        if self.keys is None:
            return [(rows, n, n) for rows, n in self.layout.groups if n]
        lengths_B2 = torch.stack([self.layout.lengths_B, self.keys.lengths_B], 1)
        runs, counts = torch.unique_consecutive(lengths_B2, return_counts=True, dim=0)
        return [(rows, n, m) for rows, (n, m) in zip(counts.tolist(), runs.tolist(), strict=True) if n or m]

    @cached_property
    def lengths(self) -> list[tuple[int, int]]:
        """How many tokens each row has, and how many it reads, without rows that have none of both."""
        return [(n, m) for rows, n, m in self.groups for _ in range(rows)]

    @cached_property
    def starts(self) -> tuple[tuple[Int[Tensor, "_"], int], ...]:
        """Where each row starts and the last one ends, on the device, and the longest: what varlen attention reads.

        Once for the tokens, once for what they read.
        """
        both = []
        for lengths in zip(*self.lengths, strict=True):
            start = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
            both.append((start.to(self.device, non_blocking=True), max(lengths)))
        return tuple(both)

    @cached_property
    def position_N(self) -> Int[Tensor, "N"]:
        """Each token's position: its place in its row, unless the attend was told otherwise (`Positions`)."""
        if self.given_N is not None:
            return self.given_N
        start_N = torch.repeat_interleave(self.layout.starts_B, self.layout.lengths_B, output_size=self.layout.size)
        return (torch.arange(self.layout.size) - start_N).to(self.device, non_blocking=True)

    @cached_property
    def masks(self) -> list[Bool[Tensor, "g 1 n m"] | None]:
        """For each group, who may attend to whom (one for all its rows where they agree); None: everyone."""
        return [self._mask(*group, *start) for group, start in zip(self.groups, self._starts, strict=True)]

    def shared(self, kind: Hashable, make: Callable[[], Made]) -> Made:
        """What layers of one kind make of the batch alike: made by the first that asks."""
        made: dict[Hashable, Any] = self.__dict__.setdefault("made_shared", {})
        if kind not in made:
            made[kind] = make()
        return made[kind]

    def runs(self, heads: int, *, like: bool = False) -> Runs:
        """What attention with explicit scores needs to know, made once for each number of heads.

        With `like`, rows of like length make up one run where that saves at least half of them.
        """
        made: dict[tuple[int, bool], Runs] = self.__dict__.setdefault("made_runs", {})
        if (heads, like) not in made:
            made[heads, like] = (self._like_runs(heads) if like else None) or self._runs(heads)
        return made[heads, like]

    def _runs(self, heads: int) -> Runs:
        queries = Order.of(_numbered([(rows, n) for rows, n, _ in self.groups]), heads)
        keys = queries
        if self.keys is not None:
            keys = Order.of(_numbered([(rows, m) for rows, _, m in self.groups]), heads)
        blind = not isinstance(self.rule, Band)
        return Runs(self.groups, heads, queries.to(self.device), keys.to(self.device), self.masks, blind)

    def _like_runs(self, heads: int) -> Runs | None:
        width_of = [_rounded(n) for _, n, _ in self.groups]
        if self.keys is not None or 2 * len(set(width_of)) > len(self.groups):
            return None
        numbered, tokens = _numbered([(rows, n) for rows, n, _ in self.groups]), []
        wide = sorted(zip(width_of, numbered, strict=True), key=itemgetter(0))
        for width, some in groupby(wide, itemgetter(0)):
            tokens.append(torch.cat([F.pad(one_gn, (0, width - one_gn.shape[1]), value=-1) for _, one_gn in some]))
        order = Order.of(tokens, heads).to(self.device)
        groups = [(len(token_gn), token_gn.shape[1], token_gn.shape[1]) for token_gn in tokens]
        return Runs(groups, heads, order, order, [self._among(token_gn.to(self.device)) for token_gn in tokens], True)

    def _among(self, token_gn: Int[Tensor, "g n"]) -> Bool[Tensor, "g 1 n n"]:
        """Who may attend to whom among tokens by number, -1 for nobody."""
        real_gn, number_gn = token_gn >= 0, token_gn.clamp(min=0)
        allowed_gnn = self.rule(number_gn[:, :, None], number_gn[:, None])
        return (allowed_gnn & real_gn[:, :, None] & real_gn[:, None])[:, None]

    @cached_property
    def distances(self) -> list[Int[Tensor, "g n n"]]:
        """For each group, the keys' positions less the queries' (one for all its rows where they agree)."""
        made = []
        for (rows, n, _), (start, _) in zip(self.groups, self._starts, strict=True):
            rows = 1 if self.given_N is None else rows
            position_gn = self.position_N[start : start + rows * n].view(rows, n)
            made.append(position_gn[:, None] - position_gn[..., None])
        return made

    @cached_property
    def crowds(self) -> list[Float[Tensor, "g 1 n m"] | None]:
        """For each group, what is added to the scores of keys that count as several tokens; None: all count as one."""
        if self.counts_M is None:
            return [None] * len(self.groups)
        log_M, made = self.counts_M.log(), []
        for (rows, n, m), (_, start) in zip(self.groups, self._starts, strict=True):
            made.append(log_M[start : start + rows * m].view(rows, 1, 1, m).expand(rows, 1, n, m))
        return made

    @cached_property
    def _starts(self) -> list[tuple[int, int]]:
        starts, q, k = [], 0, 0
        for rows, n, m in self.groups:
            starts.append((q, k))
            q, k = q + rows * n, k + rows * m
        return starts

    def _mask(self, rows: int, n: int, m: int, q: int, k: int) -> Tensor | None:
        if isinstance(self.rule, Band):
            if min(self.rule.left, self.rule.right) >= max(n, m) - 1:
                return None
            rows = 1
        q_gn1 = q + torch.arange(rows * n, device=self.device).view(rows, n, 1)
        k_g1m = k + torch.arange(rows * m, device=self.device).view(rows, 1, m)
        mask_g1nm = self.rule(q_gn1, k_g1m)[:, None]
        # asked on the CPU alone: elsewhere it would wait for the device
        return None if self.device == CPU and mask_g1nm.all() else mask_g1nm

    @cached_property
    def xformers_bias(self) -> Any:
        """The bias object of xFormers; None where it has none for this plan."""
        from xformers.ops.fmha import attn_bias

        if self.counts_M is not None or not isinstance(self.rule, Band):
            return None
        if any(not n or not m for _, n, m in self.groups):
            return None
        read = [list(lengths) for lengths in zip(*self.lengths, strict=True)]
        if self.rule == EVERYONE:
            return attn_bias.BlockDiagonalMask.from_seqlens(*read, device=self.device)
        if self.rule == CAUSAL:
            return attn_bias.BlockDiagonalCausalMask.from_seqlens(*read, device=self.device)
        if self.rule.right == 0:
            block = attn_bias.BlockDiagonalMask.from_seqlens(*read, device=self.device)
            return block.make_local_attention(int(self.rule.left) + 1)  # it counts the token itself
        return None

    @cached_property
    def block_mask(self) -> BlockMask:
        """What flex_attention reads: which blocks of the whole packed batch it may pass over, and the rule within."""
        row_N, row_M = (layout.row_N.to(self.device) for layout in (self.layout, self.read))

        # compiled where it matters: otherwise all pairs of tokens of the batch would be written out
        fast = self.device.type == "cuda"
        return create_block_mask(
            lambda b, h, q, k: (row_N[q] == row_M[k]) & self.rule(q, k),
            None, None, len(row_N), len(row_M), self.device, _compile=fast,
        )  # fmt: skip


@dataclass(frozen=True)
class Full:
    """Every token of a row attends to all tokens of the row."""

    def plan(self, layout: Layout, batch: Batch | None = None) -> Plan:
        return Plan(layout)


@dataclass(frozen=True)
class Causal:
    """Every token of a row attends to itself and to those before it."""

    def plan(self, layout: Layout, batch: Batch | None = None) -> Plan:
        return Plan(layout, CAUSAL)


@dataclass(frozen=True)
class Window:
    """Every token of a row attends to those at most `reach` places before and after it, and to itself."""

    reach: int

    def __post_init__(self) -> None:
        if self.reach < 0:
            raise ValueError(f"Window: reach must be at least 0 places, got {self.reach}; 64 sees 129 tokens")

    def plan(self, layout: Layout, batch: Batch | None = None) -> Plan:
        return Plan(layout, Band(self.reach, self.reach))


@dataclass(frozen=True)
class Together:
    """What all of some attends allow, such as Together(Causal(), Window(128))."""

    attends: tuple[Attend, ...]

    def __init__(self, *attends: Attend) -> None:
        object.__setattr__(self, "attends", attends)

    def plan(self, layout: Layout, batch: Batch | None = None) -> Plan:
        plan = Plan(layout)
        for attend in self.attends:
            other = attend.plan(layout, batch)
            if other.layers:
                raise ValueError("Together: cannot join attends that differ by layer; use Layers of Together instead")
            given_N = plan.given_N if other.given_N is None else other.given_N
            plan = Plan(layout, Both.of(plan.rule, other.rule), given_N=given_N)
        return plan


@dataclass(frozen=True)
class Layers:
    """Another attend in each layer, the lowest first: Layers([Causal()] * 8 + [Full()] * 8)."""

    attends: Sequence[Attend]

    def plan(self, layout: Layout, batch: Batch | None = None) -> Plan:
        attends, made = list(self.attends), []
        for i, attend in enumerate(attends):
            first = attends.index(attend)  # equal attends share one plan, and what it makes
            made.append(made[first] if first < i else attend.plan(layout, batch))
        return Plan(layout, layers=tuple(made))


def _numbered(runs: Sequence[tuple[int, int]]) -> list[Int[Tensor, "g n"]]:
    """The numbers of the tokens of runs of (rows, tokens)."""
    parts, start = [], 0
    for rows, n in runs:
        parts.append(torch.arange(start, start + rows * n).view(rows, n))
        start += rows * n
    return parts


def _rounded(n: int) -> int:
    """The length that a row's is brought to among others like it."""
    step = 8 if n <= 32 else 16 if n <= 128 else 32
    return -(-n // step) * step


def _moved(thing: Any, device: torch.device) -> Any:
    if isinstance(thing, Tensor):
        return thing.to(device, non_blocking=True)
    if isinstance(thing, tuple):
        return tuple(_moved(one, device) for one in thing)
    if isinstance(thing, Plan):
        made = {f.name: _moved(getattr(thing, f.name), device) for f in fields(thing)}
        return replace(thing, **made | {"device": device})
    if is_dataclass(thing) and not isinstance(thing, type):
        return replace(thing, **{f.name: _moved(getattr(thing, f.name), device) for f in fields(thing)})
    return thing
