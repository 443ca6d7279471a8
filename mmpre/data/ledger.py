"""Holes: samples that could not be used. They keep their place with weight 0, and are counted and named here.

All processes count the same holes; one of them writes `ledger.jsonl`, a line for each.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmpre.aside import append, file_aside
from mmpre.data.tar import printable

log = logging.getLogger(__name__)


class TooManyHolesError(RuntimeError):
    """A larger share of the data cannot be used than the run allows."""


@dataclass(frozen=True)
class Hole:
    """A sample that could not be used. `cause` is a short, countable name; `shard` its file name; `modality` the role
    that asked for the member, or empty where no member in particular is at fault."""

    cause: str
    shard: str
    key: str
    member: str
    modality: str
    detail: str

    def told(self) -> str:
        """Where it is and what is wrong with it, in a line."""
        where = f"{self.shard}: {self.key}" + (f".{self.member}" if self.member else "")
        return printable(where + (f", {self.detail[:200]}" if self.detail else ""))


class Ledger:
    """Counts holes by cause, shard and modality, and stops a run that loses too much.

    Shares are looked at as a whole, for each modality and, after `begin`, for each shard and named source, once
    `minimum` rows of them were seen.
    """

    def __init__(self, path: Path, *, limit: float = 0.05, minimum: int = 100) -> None:
        if not 0 <= limit <= 1:
            raise ValueError(f"Ledger: limit is a share between 0 and 1, got {limit}; 5 percent is 0.05")
        self.path, self.limit, self.minimum = path, limit, minimum
        self.seen = 0
        self.table: Counter[tuple[str, str, str]] = Counter()  # holes by cause, shard, modality
        self.by_modality: Counter[str] = Counter()  # rows seen that wanted a modality
        self.leg: int | None = None
        self.leg_seen, self.leg_table = 0, Counter[str]()  # rows and holes by shard of this leg
        self.shares: Mapping[str, float] = {}
        self.example: dict[str, Hole] = {}
        self._writes = True

    def begin(self, leg: int, shares: Mapping[str, float]) -> None:
        """A leg of the run begins (or goes on) whose rows come from shards by these shares (`Shards.shares`)."""
        if leg != self.leg:
            self.leg, self.leg_seen, self.leg_table = leg, 0, Counter()
        self.shares = shares

    def add(
        self, holes: Iterable[Hole], *, seen: int, step: int, write: bool = True, modalities: Sequence[str] = ()
    ) -> None:
        """Count the holes of a step among the `seen` rows of it, holes included, that wanted some modalities."""
        holes = list(holes)
        self.seen += seen
        self.leg_seen += seen
        for modality in modalities:
            self.by_modality[modality] += seen
        for hole in holes:
            self.table[hole.cause, hole.shard, hole.modality] += 1
            self.leg_table[hole.shard] += 1
            self.example.setdefault(hole.cause, hole)
        if holes and write:
            self._append("".join(json.dumps({"step": step, **asdict(hole)}) + "\n" for hole in holes))

    def _append(self, lines: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append(self.path, lines)
        except OSError as e:  # holes are still counted; a full disk must not end a run here
            if self._writes:
                log.warning("%s cannot be written (%s); holes are only counted from here on", self.path, e)
            self._writes = False

    def check(self) -> None:
        """Raise TooManyHolesError past the limit: of all rows, of a modality's rows, or of a shard's rows."""
        self._check("all rows", self.table.total(), self.seen)
        modalities = Counter[str]()
        for (_, _, modality), count in self.table.items():
            modalities[modality] += count
        for modality, count in modalities.items():
            if modality:
                self._check(f"rows with {printable(modality)}", count, self.by_modality.get(modality, self.seen))
        for shard, count in self.leg_table.items():
            if shard in self.shares:
                self._check(f"rows of {printable(shard)}", count, round(self.leg_seen * self.shares[shard]))
        for source, share in _by_source(self.shares).items():
            count = _by_source(self.leg_table).get(source, 0)
            self._check(f"rows of source {source}", count, round(self.leg_seen * share))

    def _check(self, what: str, holes: int, seen: int) -> None:
        if seen >= self.minimum and holes > self.limit * seen:
            raise TooManyHolesError(
                f"{holes} of {seen} {what} cannot be used, the run allows {self.limit:.1%}. {self.summary()}. "
                f"Mend the data ({self.path.name} names every sample), or allow more with max_holes"
            )

    def summary(self) -> str:
        """What was lost, in a line."""
        if not self.table:
            return f"no holes in {self.seen} rows"
        causes = Counter[str]()
        for (cause, _, _), count in self.table.items():
            causes[cause] += count
        told = []
        for cause, count in causes.most_common():
            hole = self.example.get(cause)
            told.append(f"{printable(cause)}: {count}" + (f", such as {hole.told()}" if hole else ""))
        return f"{self.table.total()} holes in {self.seen} rows ({'; '.join(told)})"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {
            "seen": self.seen,
            "table": [[*place, count] for place, count in self.table.items()],
            "modalities": dict(self.by_modality),
            "leg": self.leg,
            "leg_seen": self.leg_seen,
            "leg_table": dict(self.leg_table),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.seen, self.by_modality = state["seen"], Counter(state["modalities"])
        self.table = Counter({(cause, shard, modality): count for cause, shard, modality, count in state["table"]})
        self.leg, self.leg_seen, self.leg_table = state["leg"], state["leg_seen"], Counter(state["leg_table"])
        self.example = {}

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, which a resumed run will write again, and a line that was cut."""
        if not self.path.exists():
            return
        kept = [line for line in self.path.read_bytes().splitlines(keepends=True) if _step(line) <= step]
        with file_aside(self.path) as aside:
            aside.write_bytes(b"".join(kept))


def _by_source(numbers: Mapping[str, float]) -> dict[str, float]:
    """Sums over the shards of each named source: shards of several sources are told as SOURCE/SHARD."""
    sums: dict[str, float] = {}
    for shard, number in numbers.items():
        source, slash, _ = shard.partition("/")
        if slash:
            sums[source] = sums.get(source, 0) + number
    return sums


def _step(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
