"""Several losses read from the states of one forward pass."""
# N places of the packed batch, M places asked for, B rows, D model width

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpre.absent import Absent
from mmpre.batch import Batch
from mmpre.draw import Draw
from mmpre.heads.guess import Guess, Guesses
from mmpre.heads.matching import Matching
from mmpre.heads.protocol import Head
from mmpre.labels import NONE
from mmpre.layout import Layout
from mmpre.modality import Reader
from mmpre.network import Network
from mmpre.objectives.loss import Loss, Term
from mmpre.objectives.transport import DEFAULT, IPOT, distances, transport


@runtime_checkable
class Again(Protocol):
    """An nn.Module that encodes the embedded tokens once more, put together in another way, for a loss of its own."""

    def forward(self, net: Network, x_ND: Float[Tensor, "N D"], batch: Batch, draw: Draw) -> Loss: ...


@runtime_checkable
class Readout(Protocol):
    """An nn.Module that reads losses from states."""

    def places(self, batch: Batch) -> Int[Tensor, "M"] | None:
        """Where in the layout it reads, None for everywhere."""
        ...

    def read(self, state_MD: Float[Tensor, "M D"], batch: Batch, draw: Draw) -> Loss:
        """Loss from the states at its places."""
        ...


class OnePass(nn.Module):
    """One forward pass of a network, and what all readouts make of it.

    Only the places that a readout asks for are computed in the last layer. `roles` limits the batches to some of the
    network's modalities; by default they hold all. What is in `again` reads the same embedded tokens, encoded anew.
    """

    def __init__(
        self,
        net: Network,
        readouts: Sequence[Readout],
        *,
        again: Sequence[Again] = (),
        roles: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.readouts, self.again = nn.ModuleList(readouts), nn.ModuleList(again)
        self.roles = tuple(net.readers if roles is None else roles)
        if not self.readouts or not set(self.roles) <= set(net.readers):
            raise ValueError(
                f"OnePass: wanted at least one readout and roles among {sorted(net.readers)}, got "
                f"{len(self.readouts)} readouts and roles {list(self.roles)}"
            )

    @property
    def readers(self) -> Mapping[str, Reader]:
        return {role: self.net.readers[role] for role in self.roles}

    def forward(self, batch: Batch, draw: Draw) -> Loss:
        x_ND = self.net.embed(batch)
        asked = [readout.places(batch) for readout in self.readouts]
        if any(places_M is None for places_M in asked):
            state_ND = self.net.encode(x_ND, batch.layout, batch.plan)
            states = [state_ND if places_M is None else state_ND.index_select(0, places_M) for places_M in asked]
        else:
            state_MD = self.net.encode(x_ND, batch.layout, batch.plan, at=torch.cat(asked))
            states = state_MD.split([len(places_M) for places_M in asked])
        losses = [readout.read(s, batch, draw) for readout, s in zip(self.readouts, states, strict=True)]
        losses += [one(self.net, x_ND, batch, draw) for one in self.again]
        return Loss(
            [term for loss in losses for term in loss.terms],
            {name: value for loss in losses for name, value in loss.metrics.items()},
        )

    def states(self, readout: Readout, batch: Batch) -> Float[Tensor, "M D"]:
        """The states at one readout's places."""
        places_M = readout.places(batch)
        return self.net(batch) if places_M is None else self.net(batch, at=places_M)

    def guesses(self, batch: Batch) -> Iterator[tuple[str, Guess]]:
        """What the readouts that predict picks take them for."""
        for readout in self.readouts:
            if isinstance(readout, Predict) and isinstance(readout.head, Guesses):
                picked = batch.picked[readout.pick]
                states = self.states(readout, batch), batch.clean[picked.role], picked.clean_M
                yield readout.pick, readout.head.guess(*states)


class Predict(nn.Module):
    """Predict what the tokens of a pick were, from the states at their places (masked prediction).

    The term is called `name`, by default like the pick, and divided by the number of picked tokens, or by the count
    `per`, such as that of all tokens which the pick chose from ("ordinary:NAME"). With `before`, a
    token is predicted from the state that many places before its own, as a causal model does: GPT-BERT (arXiv:
    2410.24159) predicts masked tokens so too. No token may be picked that has none so far before it in its row.
    """

    def __init__(
        self, pick: str, head: Head, *, name: str | None = None, weight: float = 1.0, before: int = 0,
        per: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.pick, self.name, self.weight, self.before = pick, name or pick, weight, before
        self.per = per or f"picked:{pick}"
        self.head = head

    def places(self, batch: Batch) -> Int[Tensor, "M"]:
        if self.pick not in batch.picked:
            raise Absent(f"Predict: no pick {self.pick!r} in the batch; the task's view makes {sorted(batch.picked)}")
        picked = batch.picked[self.pick]
        return batch.layout.at(picked.role, picked.seen_M) - self.before

    def read(self, state_MD: Float[Tensor, "M D"], batch: Batch, draw: Draw) -> Loss:
        picked = batch.picked[self.pick]
        loss_M, also = self.head.measured(state_MD, batch.clean[picked.role], picked.clean_M)
        metrics = {f"{self.name}_{name}": (value_M.sum(), f"picked:{self.pick}") for name, value_M in also.items()}
        return Loss([Term(self.name, loss_M.float().sum(), self.per, self.weight)], metrics)


@dataclass(frozen=True)
class Means:
    """Pools a row by the mean state of each role, one after the other: of roles that have not read each other."""

    roles: tuple[str, ...]

    def places(self, batch: Batch) -> None:
        return None

    def pooled(self, state_ND: Float[Tensor, "N D"], batch: Batch) -> Float[Tensor, "B E"]:
        layout, found = batch.layout, []
        for role in self.roles:
            row_n = layout.row_N.index_select(0, layout.index[role])
            sum_BD = state_ND.new_zeros(len(layout), state_ND.shape[1])
            sum_BD = sum_BD.index_add(0, row_n, state_ND.index_select(0, layout.index[role]))
            count_B1 = layout.lengths[role].clamp(min=1)[:, None].to(state_ND.device, non_blocking=True)
            found.append(sum_BD / count_B1)
        return torch.cat(found, dim=1)


@dataclass(frozen=True)
class FirstToken:
    """Pools a row by the state of a role's first token, such as [CLS]."""

    role: str

    def places(self, batch: Batch) -> Int[Tensor, "B"]:
        return batch.layout.first(self.role)

    def pooled(self, state_BD: Float[Tensor, "B D"], batch: Batch) -> Float[Tensor, "B D"]:
        return state_BD


def _pool(how: str | Means) -> FirstToken | Means:
    return FirstToken(how) if isinstance(how, str) else how


class Match(nn.Module):
    """Tell rows whose roles belong together from those with a role of another sample, by a role's first token.

    `pool` names the role; it may also be `Means`.
    """

    def __init__(
        self, pool: str | Means, head: Matching, *, label: str = "matched", name: str = "itm", weight: float = 1.0
    ) -> None:
        super().__init__()
        self.pool, self.label, self.name, self.weight = _pool(pool), label, name, weight
        self.head = head

    def places(self, batch: Batch) -> Int[Tensor, "B"] | None:
        return self.pool.places(batch)

    def scores(self, state_MD: Float[Tensor, "M D"], batch: Batch) -> Float[Tensor, "B 2"]:
        return self.head(self.pool.pooled(state_MD, batch))

    def read(self, state_MD: Float[Tensor, "M D"], batch: Batch, draw: Draw) -> Loss:
        scores_B2, label_B = self.scores(state_MD, batch).float(), _labels(self, batch)
        right = (scores_B2.detach().argmax(1) == label_B).sum()
        loss = F.cross_entropy(scores_B2, label_B, reduction="sum")
        return Loss([Term(self.name, loss, "rows", self.weight)], {f"{self.name}_accuracy": (right, "rows")})


class Classify(nn.Module):
    """Predict a label that some rows have (`View.labels`), from the state of a role's first token, or by `Means`.

    The loss is a cross-entropy over the scores of `head`, divided by the number of rows that have one.
    """

    def __init__(
        self, pool: str | Means, head: nn.Module, *, label: str, name: str | None = None, weight: float = 1.0
    ) -> None:
        super().__init__()
        self.pool, self.label, self.name, self.weight = _pool(pool), label, name or label, weight
        self.head = head

    def places(self, batch: Batch) -> Int[Tensor, "B"] | None:
        return self.pool.places(batch)

    def read(self, state_MD: Float[Tensor, "M D"], batch: Batch, draw: Draw) -> Loss:
        if self.label not in batch.labels:
            raise Absent(
                f"Classify: no label {self.label!r} in the batch, only {sorted(batch.labels)}; the task's view needs "
                f"labels={{{self.label!r}: ...}}"
            )
        scores_BA = self.scores(state_MD, batch)
        label_B, per = batch.labels[self.label], f"labelled:{self.label}"
        loss = F.cross_entropy(scores_BA, label_B, ignore_index=NONE, reduction="sum")
        right = (scores_BA.detach().argmax(1) == label_B).sum()
        return Loss([Term(self.name, loss, per, self.weight)], {f"{self.name}_accuracy": (right, per)})

    def scores(self, state_MD: Float[Tensor, "M D"], batch: Batch) -> Float[Tensor, "B A"]:
        return self.head(self.pool.pooled(state_MD, batch)).float()


class Align(nn.Module):
    """Pull the tokens of two roles together where they match and apart where they do not, by transport distance.

    UNITER's word-region alignment: the sum of distances of matched rows minus that of the others, per row, over all
    final states of both roles, special tokens included.
    """

    def __init__(
        self,
        roles: tuple[str, str],
        *,
        ipot: IPOT = DEFAULT,
        label: str = "matched",
        name: str = "wra",
        weight: float = 0.1,
    ) -> None:
        super().__init__()
        self.roles, self.ipot, self.label, self.name, self.weight = roles, ipot, label, name, weight

    def places(self, batch: Batch) -> None:
        return None

    def read(self, state_ND: Float[Tensor, "N D"], batch: Batch, draw: Draw) -> Loss:
        distance_B = distances(state_ND, batch.layout, self.roles, self.ipot)
        sign_B = _labels(self, batch) * 2 - 1
        return Loss([Term(self.name, (distance_B * sign_B).sum(), "rows", self.weight)])

    def plan(self, state_ND: Float[Tensor, "N D"], layout: Layout, row: int) -> Float[Tensor, "x y"]:
        """Where the mass of a row's tokens of the first role goes among those of the second: to look at."""
        sides = (layout.first(role)[row] + torch.arange(int(layout.lengths[role][row])) for role in self.roles)
        return transport(*(state_ND[side] for side in sides), self.ipot)


def _labels(readout: Match | Align, batch: Batch) -> Int[Tensor, "B"]:
    if readout.label not in batch.labels:
        raise Absent(
            f"{type(readout).__name__}: no label {readout.label!r} in the batch, only {sorted(batch.labels)}; "
            "the task's view needs donors={role: OtherSample(share=0.5)}"
        )
    return batch.labels[readout.label]
