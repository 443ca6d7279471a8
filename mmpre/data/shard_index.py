"""The index of one shard: where each member of each sample stands in the tar, and the checksums that tell damage.

Kept beside the shard as `<shard>.idx` (or in a cache folder where that cannot be written): a header, then arrays that
are mapped into memory as they are, 24 bytes a member and 17 a sample beside its key, then names and problems as JSON.
"""

import hashlib
import json
import logging
import os
import struct
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mmpre.data.grouping import group
from mmpre.data.tar import Problem, printable, walk

log = logging.getLogger(__name__)
VERSION = 1
_MAGIC = b"mmpreidx"
# magic, version, own digest, then: shard size, mtime_ns, members, samples, bytes of keys, bytes of JSON, shard digest
_HEAD = struct.Struct("<8sI20x32s6q32s64x")
_CHECKED_MEMBERS = 3
_CHECKED_BYTES = 4 << 20


class ShardError(ValueError):
    """Shards that cannot be used at all; `problems` says for each one what is wrong and what to do."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        super().__init__(list(problems))
        self.problems = list(problems)

    def __str__(self) -> str:
        lines = [f"{shard}: {what}" for shard, what in self.problems]
        if len(lines) == 1:
            return lines[0]
        return f"{len(lines)} shards cannot be used:\n  " + "\n  ".join(lines)


class IndexedMember(NamedTuple):
    suffix: str
    offset: int
    size: int
    crc: int


class StaleIndexError(ValueError):
    """An index that does not fit its shard or this version; it is built again."""


class ShardIndex:
    """Where the samples of one shard stand. Picklable; a file-backed index is mapped again where it is unpickled."""

    def __init__(self, path: Path, data: np.ndarray, where: Path | None) -> None:
        """`data` is the index file as bytes, `where` the file itself or None if it could not be kept."""
        self.path, self.where, self._data = path, where, data
        head = _read_head(data)
        self.size, self.mtime_ns, members, self.count, keys, text, digest = head[3:]
        self.digest = digest.hex()
        places = np.cumsum([_HEAD.size, 8 * members, 8 * members, 8 * (self.count + 1), 8 * (self.count + 1), 4 * members,
                            4 * members, self.count, keys, text])  # fmt: skip
        if places[-1] != len(data):
            raise StaleIndexError(f"has {len(data)} bytes, its header asks for {places[-1]}")
        parts = [data[start:end] for start, end in zip(places[:-1], places[1:], strict=True)]
        self._offset_M, self._size_M, self._first_S, self._key_S = (part.view("<i8") for part in parts[:4])
        self._crc_M, self._suffix_M = (part.view("<u4") for part in parts[4:6])
        self._whole_S, self._keys = parts[6], parts[7]
        names = json.loads(bytes(parts[8]))
        self.suffixes: tuple[str, ...] = tuple(names["suffixes"])
        self.problems = [Problem(*problem) for problem in names["problems"]]
        self.causes: dict[str, int] = names["causes"]

    def __len__(self) -> int:
        return self.count

    def __reduce__(self):
        if self.where is None:
            return ShardIndex, (self.path, self._data, None)
        return _map_again, (self.path, self.where, self.digest)

    def key(self, sample: int) -> str:
        self._check(sample)
        return bytes(self._keys[self._key_S[sample] : self._key_S[sample + 1]]).decode()

    def complete(self, sample: int) -> bool:
        """Whether nothing of a sample was found lost when the shard was indexed."""
        self._check(sample)
        return bool(self._whole_S[sample])

    def members(self, sample: int) -> list[IndexedMember]:
        self._check(sample)
        part = slice(self._first_S[sample], self._first_S[sample + 1])
        numbers = (self._suffix_M, self._offset_M, self._size_M, self._crc_M)
        rows = zip(*(column[part].tolist() for column in numbers), strict=True)
        return [IndexedMember(self.suffixes[suffix], offset, size, crc) for suffix, offset, size, crc in rows]

    def same_keys(self, other: "ShardIndex") -> bool:
        return np.array_equal(self._key_S, other._key_S) and np.array_equal(self._keys, other._keys)

    def _check(self, sample: int) -> None:
        if not 0 <= sample < self.count:
            raise IndexError(f"{self.path.name} has {self.count} samples, asked for number {sample}")

    def check(self) -> None:
        """Raise StaleIndexError if the index is not whole, or does not fit the shard as it is now.

        Of the shard this looks at the size and, by their checksums, at the first, middle and last member.
        """
        if _own_digest(self._data) != _read_head(self._data)[2]:
            raise StaleIndexError("is damaged: its own digest does not fit")
        end_M = self._offset_M + self._size_M
        within = (
            len(self._offset_M) == 0
            or (self._offset_M.min() >= 0 and self._size_M.min() >= 0 and end_M.max() <= self.size)
            and self._suffix_M.max() < len(self.suffixes)
        )
        edges = ((self._first_S, len(self._offset_M)), (self._key_S, len(self._keys)))
        rising = all(edge[0] == 0 and edge[-1] == last and (np.diff(edge) >= 0).all() for edge, last in edges)
        if not within or not rising:
            raise StaleIndexError("is damaged: it points outside its shard")
        size = os.stat(self.path).st_size
        if size != self.size:
            raise StaleIndexError(f"was made of {self.size} bytes, the shard has {size}")
        with self.path.open("rb", buffering=0) as file:
            for m in {0, len(self._offset_M) // 2, len(self._offset_M) - 1} if len(self._offset_M) else ():
                if self._size_M[m] <= _CHECKED_BYTES:
                    data = os.pread(file.fileno(), int(self._size_M[m]), int(self._offset_M[m]))
                    if zlib.crc32(data) != self._crc_M[m] and self._trusted(m):
                        raise StaleIndexError("does not fit the shard's content, which has changed since")

    def _trusted(self, member: int) -> bool:
        return bool(self._whole_S[np.searchsorted(self._first_S, member, side="right") - 1])
