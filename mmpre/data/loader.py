"""From a step's number to its micro-batches, in loading workers that only prefetch.

The position in the data is one integer, the step. What a step holds is a function of it, so workers carry no state:
another number of workers or processes gives the same micro-batches, and resuming is to begin at another step.
"""

import random
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mmpre.batch import Batch, Row, Views, pack
from mmpre.data.ledger import Hole
from mmpre.data.mixture import Mixture, Stream
from mmpre.data.order import deal
from mmpre.data.prefetch import LoadingError, Prefetch
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import CorruptSample
from mmpre.data.tar import printable
from mmpre.data.units import Units
from mmpre.draw import Draw, hashed
from mmpre.modality import Reader
from mmpre.recipe import Stage
from mmpre.view import Read, View

__all__ = ["LoadingError", "MicroBatch", "MicroBatches", "Slot", "check_world", "load", "slots", "valid_slots"]

AHEAD = 1024  # positions


@dataclass(frozen=True)
class Slot:
    """What is asked of a worker: one micro-batch of one step. `most` bounds the tokens of its rows."""

    step: int
    m: int
    task: str
    start: int
    size: int
    kind: str = "train"
    most: int | None = None


@dataclass(frozen=True)
class MicroBatch:
    """What a worker delivers: packed parts (one, or several under a token limit) and the rows that could not be made.

    `units` are the numbers of all its rows in the order of the stream, holes included.
    """

    slot: Slot
    parts: Sequence[Batch | Views]
    holes: Sequence[Hole]
    units: Sequence[int]


class MicroBatches:
    """Makes the micro-batch of a slot. Picklable, without weights."""

    def __init__(
        self,
        units: Units | Mixture,
        work: Mapping[str, tuple[View | Mapping[str, View], Mapping[str, Reader]]],
        *,
        seed: int,
        stage: int,
        micro_batches: int,
        block: int,
        window: int,
        max_tokens: int | None = None,
        order: int | None = None,
    ) -> None:
        """`order` is the number of the stage whose order of rows this one goes on in, by default its own."""
        self.units, self.work = Mixture.of(units), work
        self.seed, self.stage = seed, stage
        self.micro_batches, self.max_tokens = micro_batches, max_tokens
        self.order = Stream(self.units, seed, stage if order is None else order, block=block, window=window)
        self._from, self._ahead = 0, np.empty(0, dtype=np.int64)  # units worked out ahead, from a position on

    @staticmethod
    def of(stage: Stage, units: Units | Mixture, *, seed: int, number: int, held_out: bool = False) -> "MicroBatches":
        """For all tasks of a stage, which is the `number`-th of its run; of rows to train on, or of held-out ones."""
        work = {
            task.name: (task.held_out if held_out and task.held_out is not None else task.view, task.objective.readers)
            for task in stage.tasks
        }
        return MicroBatches(
            units, work, seed=seed, stage=number, micro_batches=stage.micro_batches, block=stage.block,
            window=stage.window, max_tokens=stage.max_tokens, order=stage.origin.order,
        )  # fmt: skip

    def __getitem__(self, slot: Slot) -> MicroBatch:
        try:
            return self._make(slot)
        except OSError as e:  # storage, not data: named as it is, after the reader's own retries
            raise LoadingError(f"reading step {slot.step} failed: {e}") from None
        except (Exception, SystemExit) as e:
            detail = traceback.format_exc(limit=-4)
            raise LoadingError(
                f"loading worker, step {slot.step}, task {slot.task}: {type(e).__name__}: {e}\n{detail}"
            ) from None

    def note(self, unit: int) -> None:
        """Called with each unit that is begun; loading workers put their own in its place."""

    def name(self, unit: int) -> str:
        shard, key = self.units.identity(unit)
        return f"{printable(shard)}: {printable(key)}"

    def _make(self, slot: Slot) -> MicroBatch:
        positions = np.arange(slot.start, slot.start + slot.size, dtype=np.int64)
        units = self._units_at(slot.start, slot.start + slot.size)
        lengths = self.units.lengths(units)
        if lengths is not None and slot.most is not None:
            lengths = np.minimum(lengths, slot.most)
        mine = deal(lengths, self.micro_batches, rows=slot.size)[slot.m]
        view, readers = self.work[slot.task]
        views = view if isinstance(view, Mapping) else {"": view}
        begun: list[dict[str, Read | Row]] = []
        holes: list[Hole] = []
        _seed_libraries(hashed(self.seed, self.stage, "libraries", slot.kind, slot.step, slot.m))
        epochs = self.order.epochs(positions[mine])
        for position, unit, epoch in zip(positions[mine].tolist(), units[mine].tolist(), epochs, strict=True):
            self.note(unit)
            draw = Draw.row(self.seed, self.stage, slot.step, epoch=epoch, unit=unit, index=position - slot.start)
            one = self._begin(draw, position, unit, views, readers, slot.most)
            (holes if isinstance(one, Hole) else begun).append(one)
        packed = [_pack(part, views) for part in _split(_finish(begun, views), self.max_tokens)]
        parts = [Views(part) if isinstance(view, Mapping) else part[""] for part in packed]
        return MicroBatch(slot, parts, holes, units[mine].tolist())

    def _units_at(self, first: int, last: int) -> np.ndarray:
        """The units at positions `first` to `last` (exclusive); to work out many costs little more than a few."""
        if not self._from <= first <= last <= self._from + len(self._ahead):
            self._from, self._ahead = first, self.order.units(np.arange(first, max(last, first + AHEAD)))
        return self._ahead[first - self._from : last - self._from]

    def _begin(
        self, draw: Draw, position: int, unit: int, views: Mapping[str, View], readers: Mapping[str, Reader],
        most: int | None,
    ) -> dict[str, Read | Row] | Hole:  # fmt: skip
        """A unit's row in each view, masked already unless the view masks all rows at once, or the hole it leaves."""

        def other(role: str, k: int) -> Sample:
            return self.units.sample(self.order.donor(position, unit, f"{role}{k}")).at_most(most)

        try:
            sample = self.units.sample(unit).at_most(most)
            return {
                name: (one.read if one.at_once else one.row)(
                    sample, readers, draw.child("view", name) if name else draw, other
                )
                for name, one in views.items()
            }
        except CorruptSample as e:
            shard = self.units.label(self.units.source(unit)[0], e.shard)
            return Hole(cause=e.cause, shard=shard, key=e.key, member=e.member, modality="", detail=e.detail)
        except BadMember as e:
            shard, key = self.units.identity(unit)
            if e.sample is not None:  # what another sample lent
                shard, key = self.units.label(self.units.source(unit)[0], e.sample.shard), e.sample.key
            modality = next((role for role, reader in readers.items() if e.member.split("|")[0] in reader.suffixes), "")
            return Hole(cause=e.cause, shard=shard, key=key, member=e.member, modality=modality, detail=e.detail)


def _seed_libraries(number: int) -> None:
    """For readers and augmentations that draw from a library's own generator: alike for every number of workers and
    processes, and never the same for two micro-batches."""
    torch.manual_seed(number)
    np.random.seed(number % (1 << 32))
    random.seed(number)


def _finish(begun: Sequence[Mapping[str, Read | Row]], views: Mapping[str, View]) -> list[dict[str, Row]]:
    """Mask the rows of those views that mask all of them at once."""
    rows = {name: [one[name] for one in begun] for name in views} if begun else {}
    made = {name: views[name].masked(some) if views[name].at_once else some for name, some in rows.items()}
    return [dict(zip(made, row, strict=True)) for row in zip(*made.values(), strict=True)]


def _pack(rows: Sequence[Mapping[str, Row]], views: Mapping[str, View]) -> dict[str, Batch]:
    return {name: pack([row[name] for row in rows], one.attend.plan) for name, one in views.items()}


def _split(rows: list[dict[str, Row]], max_tokens: int | None) -> list[list[dict[str, Row]]]:
    """Cut a micro-batch so that no part passes the token limit; depends on the rows' lengths alone."""
    if not rows:
        return []
    if max_tokens is None:
        return [rows]
    parts: list[list[dict[str, Row]]] = [[]]
    filled = 0
    for row in sorted(rows, key=_length):
        if parts[-1] and filled + _length(row) > max_tokens:
            parts.append([])
            filled = 0
        parts[-1].append(row)
        filled += _length(row)
    return parts


def _length(row: Mapping[str, Row]) -> int:
    return sum(one.length for one in row.values())


def slots(stage: Stage, seed: int, first: int, last: int, rank: int, world: int) -> Iterator[Slot]:
    """The slots of steps `first` to `last` (exclusive) of one rank: micro-batches m with m mod world = rank."""
    for step in range(first, last):
        start, size = stage.batch_at(step)
        task, most = stage.task_at(step, seed).name, stage.length_at(step)
        for m in range(rank, stage.micro_batches, world):
            yield Slot(step, m, task, start, size, most=most)


def valid_slots(stage: Stage, rows: int, rank: int = 0, world: int = 1) -> Iterator[Slot]:
    """The slots of a held-out evaluation: for each task, the first `rows` positions."""
    for task in stage.tasks:
        for start in range(0, rows, stage.batch):
            for m in range(rank, stage.micro_batches, world):
                yield Slot(start // stage.batch, m, task.name, start, min(stage.batch, rows - start), kind="valid")


def check_world(micro_batches: int, world: int) -> None:
    """Refuse a number of processes that does not divide the recipe's micro-batches."""
    if micro_batches % world:
        legal = ", ".join(str(w) for w in range(1, micro_batches + 1) if micro_batches % w == 0)
        raise ValueError(
            f"{world} processes cannot share {micro_batches} micro-batches a step evenly; "
            f"use one of {legal} processes, or set the recipe's micro_batches to a multiple of {world}"
        )


def load(data: "MicroBatches", order: Iterable[Slot], workers: int, *, pin: bool = False) -> Prefetch[MicroBatch]:
    """Make the micro-batches of slots in their order; workers prefetch and ignore signals meant for the trainer."""
    return Prefetch(data, order, workers, pin=pin)
