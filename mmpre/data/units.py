"""Units: what one row is made of. A unit is a sample, or a window of one where a reader cuts samples into windows.

Window lengths are measured once and kept beside the shards, by the reader's digest, so later starts read them back.
"""

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mmpre.aside import file_aside
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import CorruptSample, ShardReader, Sidecar
from mmpre.modality import Reader

log = logging.getLogger(__name__)
KEPT_BYTES = 64 << 20  # of samples that are cut into windows, so that each window does not read all of its sample again
NAMED_SHARDS = 2000  # in a run's record, to say which of them differ


class TooFewSamplesError(ValueError):
    """The data holds fewer units than a step takes."""


class Units:
    """The units of some shards, numbered; reads their samples."""

    def __init__(
        self,
        reader: ShardReader,
        sidecars: Sequence[Sidecar] = (),
        windows: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        """`windows` is (units before each sample, with the total last; model tokens of each unit), or None where
        every unit is a sample of unknown length."""
        self.reader, self.sidecars, self.windows = reader, tuple(sidecars), windows
        self.shards = reader.shards
        self._kept: OrderedDict[int, Sample] = OrderedDict()
        self._kept_bytes = 0  # in self._kept

    def __len__(self) -> int:
        return int(self.windows[0][-1]) if self.windows else len(self.shards)

    def place(self, unit: int) -> tuple[int, int]:
        """The sample and the window of a unit."""
        if self.windows is None:
            return unit, 0
        before = self.windows[0]
        sample = int(before.searchsorted(unit, side="right")) - 1
        return sample, unit - int(before[sample])

    def lengths(self, units: np.ndarray) -> np.ndarray | None:
        return self.windows[1][units] if self.windows else None

    def identity(self, unit: int) -> tuple[str, str]:
        """The shard's name and the sample's key, for messages and the ledger."""
        sample, _ = self.place(unit)
        return self.shards.locate(sample)[0].path.name, self.shards.key(sample)

    def sample(self, unit: int) -> Sample:
        """A unit's sample. Those cut into windows are kept for a while: their other windows come soon in the order."""
        number, window = self.place(unit)
        if self.windows is None or self.windows[0][number + 1] - self.windows[0][number] == 1:
            return self._read(number)
        if number not in self._kept:
            self._kept[number] = self._read(number)
            self._kept_bytes += _size(self._kept[number])
            while len(self._kept) > 1 and self._kept_bytes > KEPT_BYTES:
                self._kept_bytes -= _size(self._kept.popitem(last=False)[1])
        self._kept.move_to_end(number)
        return self._kept[number].at_window(window)

    def describe(self) -> dict[str, object]:
        """What a run records of its data."""
        told = {"fingerprint": self.shards.fingerprint, "samples": len(self.shards), "units": len(self)}
        if len(self.shards.indexes) <= NAMED_SHARDS:
            told["shards"] = [[index.path.name, index.digest[:16]] for index in self.shards.indexes]
        if self.sidecars:
            told["sidecars"] = [sidecar.reader.shards.fingerprint for sidecar in self.sidecars]
        return told

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_kept": OrderedDict(), "_kept_bytes": 0}

    def _read(self, number: int) -> Sample:
        members = self.reader.read(number)
        for sidecar in self.sidecars:
            members = members | sidecar.read(number)
        index, local = self.shards.locate(number)
        return Sample(index.key(local), index.name, index.digest, members)


def _size(sample: Sample) -> int:
    return sum(map(len, sample.members.values()))


def measure(units: Units, readers: Iterable[Reader], cache: Path) -> Units:
    """Cut samples into windows where one of the readers does so; other readers see the whole sample.

    Raises ValueError where two readers cut: a row cannot follow two sets of windows.
    """
    cutting = {id(reader): reader for reader in readers if getattr(reader, "windowed", False)}
    if not cutting:
        return units
    if len({reader.digest for reader in cutting.values()}) > 1:
        raise ValueError(
            f"{len(cutting)} readers cut samples into windows; at most one may, the others read whole samples"
        )
    reader = next(iter(cutting.values()))
    before, lengths = _cached(units, reader, cache)
    return Units(units.reader, units.sidecars, (before, lengths))


def _cached(units: Units, reader: Reader, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    name = hashlib.blake2b(f"{units.shards.fingerprint} {reader.digest}".encode(), digest_size=12).hexdigest()
    path = cache / f"windows-{name}.npz"
    if path.exists():
        try:
            with np.load(path, allow_pickle=False) as kept:
                before, lengths = kept["before"], kept["lengths"]
            if len(before) != len(units.shards) + 1 or before[-1] != len(lengths):
                raise ValueError(f"it is of {len(before) - 1} samples, not of {len(units.shards)}")
            return before, lengths
        except Exception as e:  # a damaged file may fail anywhere within zip
            log.warning("%s cannot be read (%s) and is measured again", path, e)
    log.info("measuring %d samples once, to cut them into windows", len(units.shards))
    counts, lengths, broken, last = [], [], 0, ""
    for i in range(len(units.shards)):
        try:
            windows = reader.windows(units.sample(i))
        except (BadMember, CorruptSample) as e:
            windows = [1]  # kept as one unit, so that the loader meets and counts the hole
            broken, last = broken + 1, f"{units.shards.key(i)}: {e}"
        counts.append(len(windows))
        lengths += windows
    if broken:
        log.warning("%d of %d samples cannot be read and count as one row each, such as %s", broken, len(counts), last)
    before = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    measured = np.asarray(lengths, dtype=np.int32)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with file_aside(path) as aside, aside.open("wb") as file:
            np.savez(file, before=before, lengths=measured)
    except OSError as e:
        log.warning("window lengths are not kept: %s", e)
    return before, measured
