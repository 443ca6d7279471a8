"""Attends that ask the rows' tokens, roles or labels, and `Positions`, which reads where tokens stand."""
# B rows, N tokens of the packed batch, n tokens of one row, E pairs of an edge field, R roles

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmpre.absent import Absent
from mmpre.attention import Attend, Plan
from mmpre.attention.rules import Rule
from mmpre.batch import Batch
from mmpre.layout import Layout


@dataclass(frozen=True)
class Roles:
    """Tokens of a role attend to those of the roles that `sees` names for it; roles it does not name see everyone.

    Roles({"text": ("image",), "image": ("text",)}) reads across only, Roles({"text": ("text",)}) hides pictures from
    text.
    """

    sees: Mapping[str, Sequence[str]]

    def plan(self, layout: Layout, batch: Batch | None = None) -> Plan:
        allowed_RR = torch.ones(len(layout.roles), len(layout.roles), dtype=torch.bool)
        for i, reader in enumerate(layout.roles):
            for j, read in enumerate(layout.roles):
                allowed_RR[i, j] = read in self.sees.get(reader, layout.roles)
        role_N = torch.empty(layout.size, dtype=torch.int64)
        for i, role in enumerate(layout.roles):
            role_N[layout.index[role].cpu()] = i
        return Plan(layout, _Roles(allowed_RR, role_N))


@dataclass(frozen=True)
class _Roles:
    allowed_RR: Bool[Tensor, "R R"]
    role_N: Int[Tensor, "N"]

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return self.allowed_RR[self.role_N[q], self.role_N[k]]


@dataclass(frozen=True)
class Prefix:
    """Tokens of `role`, or those among them that the field `field` marks, see each other; all see those before them.

    As the first tokens of a row they are the prefix of a prefix language model.
    """

    role: str
    field: str | None = None

    def plan(self, layout: Layout, batch: Batch | None = None) -> Plan:
        return Plan(layout, _Prefix(_marked(self, layout, batch, self.role, self.field)))


@dataclass(frozen=True)
class _Prefix:
    open_N: Bool[Tensor, "N"]

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) | (self.open_N[q] & self.open_N[k])


@dataclass(frozen=True)
class Slots:
    """Tokens of `role`, or those among them that the field `field` marks, see the others and themselves; no one else
    sees them.

    They ask questions of the content without changing it: the fine-grained slots of ERNIE-Gram (Xiao et al. 2020,
    arXiv:2010.12148).
    """

    role: str
    field: str | None = None

    def plan(self, layout: Layout, batch: Batch | None = None) -> Plan:
        return Plan(layout, _Slots(_marked(self, layout, batch, self.role, self.field)))


@dataclass(frozen=True)
class _Slots:
    slot_N: Bool[Tensor, "N"]

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        return ~self.slot_N[k] | (q == k)


@dataclass(frozen=True)
class Graph:
    """Nodes see, and are seen by, only whom edges name, and themselves; all other tokens see each other.

    Nodes are the tokens of `role`, or those among them that the field `nodes` marks. `edges` names the field of
    `role`'s tokens with pairs, (E, 2): in each, the first sees the second, both being numbers of tokens of `role` in
    their row (with `refers_to="tokens"` or without). `links` names such fields for other roles: the first number is
    of a token of `role`, the second of one of the other role (which may be `role` itself), and the two see each other.
    With `special` the special tokens of all roles that are no nodes see nodes and are seen by them.
    Source: graph-guided masked attention of GraphCodeBERT, Guo et al. 2020, arXiv:2009.08366.
    """

    role: str
    edges: str | None = "edges"
    nodes: str | None = None
    links: Mapping[str, str] | None = None
    special: bool = False

    def plan(self, layout: Layout, batch: Batch | None = None) -> Plan:
        node_N = _marked(self, layout, batch, self.role, self.nodes)
        open_N = torch.zeros_like(node_N)
        for role in layout.roles if self.special else ():
            open_N[layout.index[role].cpu()] = _seen(self, batch, role).special_N >= 0
        open_N &= ~node_N
        n_N = torch.repeat_interleave(layout.lengths_B, layout.lengths_B, output_size=layout.size)
        start_N = torch.repeat_interleave(layout.starts_B, layout.lengths_B, output_size=layout.size)
        # the rows' n x n tables lie end to end; entry (q, k) stands at base_N[q] + k
        base_N = n_N.cumsum(0) - n_N - start_N
        edge_X = torch.zeros(int(n_N.sum()), dtype=torch.bool)
        if self.edges:
            q_E, k_E = self._pairs(layout, batch, self.edges, self.role)
            edge_X[base_N[q_E] + k_E] = True
        for other, name in (self.links or {}).items():
            q_E, k_E = self._pairs(layout, batch, name, other)
            edge_X[base_N[q_E] + k_E] = True
            edge_X[base_N[k_E] + q_E] = True
        return Plan(layout, _Graph(node_N, open_N, edge_X, base_N))

    def _pairs(self, layout: Layout, batch: Batch | None, name: str, other: str) -> Tensor:
        """Return the places of both ends of each pair, as (2, E)."""
        if self.role not in layout.roles or other not in layout.roles:
            return torch.zeros(2, 0, dtype=torch.int64)
        field = _seen(self, batch, self.role).fields[name]
        pair_E2 = field.values
        if pair_E2.ndim != 2 or pair_E2.shape[1] != 2:
            raise ValueError(f"Graph: field {name!r} must hold pairs, shape (E, 2), got {tuple(pair_E2.shape)}")
        if field.refers_to and other != self.role:
            raise ValueError(f"Graph: field {name!r} counts tokens of {other!r} and must not refer to other fields")
        ends = []
        for role, end_E in zip((self.role, other), pair_E2.unbind(1), strict=True):
            if not field.refers_to:  # counted within the row, so far
                start_B = layout.lengths[role].cumsum(0) - layout.lengths[role]
                end_E = end_E + torch.repeat_interleave(start_B, field.lengths_B)
            ends.append(layout.index[role].cpu()[end_E])
        return torch.stack(ends)


@dataclass(frozen=True)
class _Graph:
    node_N: Bool[Tensor, "N"]
    open_N: Bool[Tensor, "N"]
    edge_X: Bool[Tensor, "X"]
    base_N: Int[Tensor, "N"]

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        # flex_attention asks for tokens of two rows too, whose entry may lie outside of the tables
        edge = self.edge_X[(self.base_N[q] + k).clamp(0, len(self.edge_X) - 1)]
        return edge | (q == k) | self.open_N[q] | self.open_N[k] | ~(self.node_N[q] | self.node_N[k])


@dataclass(frozen=True)
class PerRow:
    """Another attend in each row: the row's label `label` is its number among `attends`.

    GPT-BERT (Charpentier and Samuel 2024, arXiv:2410.24159) has bidirectional and causal rows in one batch:
    PerRow((Full(), Causal()), label="causal").
    """

    attends: tuple[Attend, ...]
    label: str

    def plan(self, layout: Layout, batch: Batch | None = None) -> Plan:
        labels = {} if batch is None else batch.labels
        if self.label not in labels:
            raise Absent(f"PerRow: no label {self.label!r} in the batch, only {sorted(labels)}; its view must set it")
        choice_B = labels[self.label].to(torch.int64)
        if len(choice_B) and not 0 <= int(choice_B.min()) <= int(choice_B.max()) < len(self.attends):
            raise ValueError(
                f"PerRow: label {self.label!r} must be a number from 0 to {len(self.attends) - 1}, one of the "
                f"attends, got {sorted(set(choice_B.tolist()))}"
            )
        plans = [attend.plan(layout, batch) for attend in self.attends]
        if any(plan.layers or plan.given_N is not None for plan in plans):
            raise ValueError(
                "PerRow: cannot choose among attends that differ by layer or set positions; set them for all"
            )
        rules = tuple(plan.rule for plan in plans)
        return Plan(layout, _PerRow(rules, choice_B[layout.row_N.cpu()]))


@dataclass(frozen=True)
class _PerRow:
    rules: tuple[Rule, ...]
    choice_N: Int[Tensor, "N"]

    def __call__(self, q: Tensor, k: Tensor) -> Tensor:
        allowed = self.rules[0](q, k)
        for i, rule in enumerate(self.rules[1:], 1):
            allowed = torch.where(self.choice_N[q] == i, rule(q, k), allowed)
        return allowed


@dataclass(frozen=True)
class Positions:
    """An attend whose biases and rotary embeddings read tokens' positions from fields, as role -> field.

    Tokens of roles that are not named keep their place in the row. Absolute positions are the modality's business.
    """

    fields: Mapping[str, str]
    attend: Attend

    def plan(self, layout: Layout, batch: Batch | None = None) -> Plan:
        plan = self.attend.plan(layout, batch)
        given_N = plan.position_N.clone()
        for role, name in self.fields.items():
            if role in layout.roles:
                given_N[layout.index[role].cpu()] = _each(self, batch, role, name).to(torch.int64)
        layers = tuple(replace(one, given_N=given_N) for one in plan.layers)
        return replace(plan, given_N=given_N, layers=layers)


def _marked(who: Attend, layout: Layout, batch: Batch | None, role: str, name: str | None) -> Bool[Tensor, "N"]:
    """True at the places of a role's tokens; with a field, where it is true of them."""
    marked_N = torch.zeros(layout.size, dtype=torch.bool)
    if role in layout.roles:
        marked_N[layout.index[role].cpu()] = True if name is None else _each(who, batch, role, name).bool()
    return marked_N


def _each(who: Attend, batch: Batch | None, role: str, name: str) -> Tensor:
    """A field of a role's tokens with one entry a token."""
    tokens = _seen(who, batch, role)
    value = tokens[name]
    if value.shape != (len(tokens),):
        raise ValueError(
            f"{type(who).__name__}: field {name!r} must hold one number for each of {len(tokens)} tokens of role "
            f"{role!r}, got shape {tuple(value.shape)}"
        )
    return value


def _seen(who: Attend, batch: Batch | None, role: str):
    if batch is None:
        raise ValueError(
            f"{type(who).__name__}: asks the tokens of role {role!r}, but was given lengths alone; "
            "plan it by a View, or call plan(layout, batch)"
        )
    return batch.seen[role]
