"""Several sources in one stream, in exact proportions, with nothing to save: the source of a position is computed.

A cycle of `sum of weights` positions holds each source exactly as often as its weight says, spread as evenly as whole
numbers allow, and repeats: so does every window of that length, wherever it begins. A source's own position is the
number of its places before it, in closed form; its units have an order and epochs of their own.
"""
# P positions, S sources, W places of a cycle

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from mmpre.data.order import Order, donor
from mmpre.data.sample import Sample
from mmpre.data.units import TooFewSamplesError, Units
from mmpre.draw import Key, hashed

MAX_CYCLE = 1 << 16


@dataclass(frozen=True)
class Source:
    """One of the sources of a stage: shards, and what part of the rows they give, as a whole number of parts."""

    data: Sequence[str]
    weight: int = 1
    sidecar: str | None = None


def sources(data: Sequence[str] | Mapping[str, Source], sidecar: str | None = None) -> dict[str, Source]:
    """The sources of a stage's data: one without a name, or those that `NAME@WEIGHT=SHARDS` names, or as they are.

    Raises ValueError that lists all that is wrong with names and weights.
    """
    if isinstance(data, Mapping):
        found = dict(data)
    else:
        marked = [re.fullmatch(r"([A-Za-z][\w-]*)@([^=/]*)=(.+)", str(url)) for url in data]
        if not any(marked):
            return {"": Source(data, sidecar=sidecar)}
        if not all(marked):
            plain = next(url for url, mark in zip(data, marked, strict=True) if not mark)
            what = f"write all as NAME@WEIGHT=SHARDS, as in a@3={plain}"
            raise ValueError(f"data: {plain} belongs to no source; {what}")
        found = {}
        for name, weight, url in (mark.groups() for mark in marked):
            before = found.get(name, Source((), _number(weight)))
            if before.weight != _number(weight):
                raise ValueError(f"data: source {name!r} has weights {before.weight} and {weight}; give it one")
            found[name] = Source((*before.data, url), before.weight)
    problems = [_problem(name, source) for name, source in found.items() if _problem(name, source)]
    if sidecar:
        problems.append("several sources share no sidecar; name each one's own with Source(..., sidecar=...)")
    if not problems and sum(_reduced(found)) > MAX_CYCLE:
        what = f"weights add up to {sum(_reduced(found)):,} parts in lowest terms"
        problems.append(f"{what}, at most {MAX_CYCLE:,} are planned; round them")
    if problems or not found:
        raise ValueError("data: " + ("; ".join(problems) or "no source is given"))
    return found


def cycle(weights: Sequence[int]) -> Int[np.ndarray, "W"]:
    """Which source stands at each place of a cycle: after any t places each has had its share of t, within one.

    Of the sources that are due, the one whose next place is needed first is taken (Tijdeman 1980, the chairman
    assignment problem).
    """
    total, taken = sum(weights), [0] * len(weights)
    places = []
    for t in range(total):
        due = [s for s, weight in enumerate(weights) if taken[s] * total <= t * weight and taken[s] < weight]
        # the next place of s is needed by (taken + 1) * total / weight: compared as fractions, in whole numbers
        chosen = due[0]
        for s in due[1:]:
            if (taken[s] + 1) * weights[chosen] < (taken[chosen] + 1) * weights[s]:
                chosen = s
        taken[chosen] += 1
        places.append(chosen)
    return np.array(places, dtype=np.int64)


class Mixture:
    """The units of several sources, numbered through source by source. Picklable."""

    def __init__(self, units: Mapping[str, Units], weights: Sequence[int]) -> None:
        self.names, self.parts = tuple(units), tuple(units.values())
        divisor = math.gcd(*weights)
        self.weights = tuple(weight // divisor for weight in weights)
        self.cycle_W = cycle(self.weights)
        share_WS = self.cycle_W[:, None] == np.arange(len(self.parts))
        self.before_WS = share_WS.cumsum(0) - share_WS  # a source's places before each place of the cycle
        self.first = np.cumsum([0, *(len(part) for part in self.parts)])  # units before each source, then all

    @staticmethod
    def of(units: "Units | Mixture") -> "Mixture":
        return units if isinstance(units, Mixture) else Mixture({"": units}, [1])

    def __len__(self) -> int:
        return int(self.first[-1])

    def at(self, position_P: Int[np.ndarray, "P"]) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"]]:
        """The source of each position, and the position in that source's own stream."""
        round_P, place_P = np.divmod(np.asarray(position_P, dtype=np.int64), len(self.cycle_W))
        source_P = self.cycle_W[place_P]
        return source_P, round_P * np.array(self.weights)[source_P] + self.before_WS[place_P, source_P]

    def source(self, unit: int) -> tuple[int, int]:
        """The source of a unit, and its number there."""
        source = int(self.first.searchsorted(unit, side="right")) - 1
        return source, unit - int(self.first[source])

    def lengths(self, units: np.ndarray) -> np.ndarray | None:
        """Model tokens of units, None where a source of theirs does not know."""
        source_U = np.searchsorted(self.first, units, side="right") - 1
        lengths_U = np.zeros(len(units), dtype=np.int64)
        for s in np.unique(source_U).tolist():
            known = self.parts[s].lengths(units[source_U == s] - self.first[s])
            if known is None:
                return None
            lengths_U[source_U == s] = known
        return lengths_U

    def sample(self, unit: int) -> Sample:
        source, own = self.source(unit)
        return self.parts[source].sample(own)

    def identity(self, unit: int) -> tuple[str, str]:
        """The shard's name, after its source's, and the sample's key, for messages and the ledger."""
        source, own = self.source(unit)
        shard, key = self.parts[source].identity(own)
        return self.label(source, shard), key

    def label(self, source: int, shard: str) -> str:
        return f"{self.names[source]}/{shard}" if self.names[source] else shard

    def shares(self) -> dict[str, float]:
        """Each shard's share of the rows, by its name in the ledger."""
        shares: dict[str, float] = {}
        for s, part in enumerate(self.parts):
            for shard, share in part.shards.shares().items():
                label = self.label(s, shard)
                shares[label] = shares.get(label, 0.0) + share * self.weights[s] / sum(self.weights)
        return shares

    def check(self, batch: int) -> None:
        """Raise TooFewSamplesError where a step could take a unit twice."""
        for s, (name, part) in enumerate(zip(self.names, self.parts, strict=True)):
            rows = self._most(s, batch)
            if len(part) < rows:
                where = f"source {name!r}" if name else "the data"
                raise TooFewSamplesError(
                    f"a step takes {rows} rows{' of it' if name else ''}, {where} has {len(part)} units; "
                    "give more data or a smaller batch"
                )

    def _most(self, source: int, batch: int) -> int:
        """The most rows of a source among `batch` neighbours, wherever they begin."""
        size, places_W = len(self.cycle_W), self.cycle_W == source
        rounds, rest = divmod(batch, size)
        before = np.concatenate([[0], np.tile(places_W, 2).cumsum()])
        return rounds * self.weights[source] + int((before[rest : rest + size] - before[:size]).max())

    def describe(self) -> dict[str, object]:
        """What a run records of its data."""
        told = [part.describe() for part in self.parts]
        if self.names == ("",):
            return told[0]
        named = {n: one | {"weight": w} for n, one, w in zip(self.names, told, self.weights, strict=True)}
        return {
            "fingerprint": hashlib.sha256(json.dumps(_unnamed(named), sort_keys=True).encode()).hexdigest(),
            "samples": sum(one["samples"] for one in told), "units": len(self), "sources": named,
        }  # fmt: skip


def _unnamed(named: dict[str, dict[str, object]]) -> dict[str, dict[str, object]]:
    """What the sources hold, without their shards' names: a shard may be renamed. Sidecars are compared apart."""
    left_out = ("shards", "sidecars")
    return {name: {key: value for key, value in one.items() if key not in left_out} for name, one in named.items()}


class Stream:
    """Which unit stands at a position of a mixture."""

    def __init__(self, mixture: Mixture, seed: int, stage: int, *, block: int, window: int) -> None:
        self.mixture = mixture
        alone = len(mixture.parts) == 1  # one source keeps its order whatever it is called
        self.orders = [
            Order(len(part), hashed(seed, stage, "order", *(() if alone else (name,))), block=block, window=window)
            for name, part in zip(mixture.names, mixture.parts, strict=True)
        ]

    def units(self, position_P: Int[np.ndarray, "P"]) -> Int[np.ndarray, "P"]:
        source_P, own_P = self.mixture.at(position_P)
        unit_P = np.empty_like(own_P)
        for s, order in enumerate(self.orders):
            mine = source_P == s
            unit_P[mine] = order.units(own_P[mine]) + self.mixture.first[s]
        return unit_P

    def epochs(self, position_P: Int[np.ndarray, "P"]) -> list[int]:
        """How often each position's source was seen whole before it."""
        source_P, own_P = self.mixture.at(position_P)
        return [self.orders[s].epoch(own) for s, own in zip(source_P.tolist(), own_P.tolist(), strict=True)]

    def donor(self, position: int, unit: int, purpose: Key) -> int:
        """Another unit of the same source."""
        source, own = self.mixture.source(unit)
        order = self.orders[source]
        other = donor(position, order.count, order.seed, purpose, own=own)
        return other + int(self.mixture.first[source])


def _number(text: str) -> int | str:
    return int(text) if re.fullmatch(r"\d{1,9}", text) else text


def _reduced(found: Mapping[str, Source]) -> list[int]:
    weights = [source.weight for source in found.values()]
    return [weight // math.gcd(*weights) for weight in weights]


def _problem(name: str, source: Source) -> str:
    weight = source.weight
    if isinstance(weight, bool) or not isinstance(weight, int) or weight < 1:
        whole = "the weight must be a whole number of parts, at least 1"
        return f"source {name!r}: {whole}, got {weight!r}; 0.7 to 0.3 is 7 to 3, and a source of weight 0 is left out"
    if not re.fullmatch(r"[A-Za-z][\w-]*", name):
        return f"source {name!r}: a name is a letter, then letters, digits, - and _"
    return "" if source.data else f"source {name!r} has no shards"
