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
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from mmpre.data.grouping import Grouped, group
from mmpre.data.tar import Problem, Walk, printable, walk

log = logging.getLogger(__name__)
VERSION = 1
_MAGIC = b"mmpreidx"
# magic, version, own digest, then: shard size, mtime_ns, members, samples, bytes of keys, bytes of JSON, shard digest
_HEAD = struct.Struct("<8sI20x32s6q32s64x")
_OWN = slice(32, 64)  # its own digest's place in the header
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
        self.path, self.where, self.data = path, where, data
        self.name = path.name
        magic, version, own, *numbers, digest = _HEAD.unpack(bytes(data[: _HEAD.size]))
        if magic != _MAGIC:
            raise StaleIndexError("is no index of mmpre")
        if version != VERSION:
            raise StaleIndexError(f"has format {version}, wanted {VERSION}")
        if own != _own_digest(data):
            raise StaleIndexError("is damaged or half written: its own digest does not fit")
        self.size, self.mtime_ns, members, self.count, keys, text = numbers
        self.digest = digest.hex()
        sizes = [8 * members, 8 * members, 8 * (self.count + 1), 8 * (self.count + 1), 4 * members, 4 * members,
                 self.count, keys, text]  # fmt: skip
        edges = list(accumulate(sizes, initial=_HEAD.size))
        if min(sizes) < 0 or edges[-1] != len(data):
            raise StaleIndexError("is damaged: its header does not fit its length")
        parts = [data[start:end] for start, end in pairwise(edges)]
        self._offset_M, self._size_M, self._first_S, self._key_S = (part.view("<i8") for part in parts[:4])
        self._crc_M, self._suffix_M = (part.view("<u4") for part in parts[4:6])
        self._whole_S, self._keys = parts[6], parts[7]
        try:
            names = json.loads(bytes(parts[8]))
            self.suffixes: tuple[str, ...] = tuple(names["suffixes"])
            self.problems = [Problem(*problem) for problem in names["problems"]]
            self.causes: dict[str, int] = dict(names["causes"])
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise StaleIndexError(f"is damaged: {e}") from None
        if not self._points_inside():
            raise StaleIndexError("is damaged: it points outside its shard")

    def _points_inside(self) -> bool:
        """An index that came with a shard is data like the shard itself."""
        edges = ((self._first_S, len(self._offset_M)), (self._key_S, len(self._keys)))
        if any(edge[0] != 0 or edge[-1] != last or (np.diff(edge) < 0).any() for edge, last in edges):
            return False
        inside_M = (self._offset_M >= 0) & (self._size_M >= 0) & (self._offset_M <= self.size - self._size_M)
        return bool(inside_M.all() and (self._suffix_M < len(self.suffixes)).all())

    def __len__(self) -> int:
        return self.count

    def __reduce__(self):
        if self.where is None:
            return ShardIndex, (self.path, self.data, None)
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
        suffix, offset, size, crc = (one.item for one in (self._suffix_M, self._offset_M, self._size_M, self._crc_M))
        numbers = range(self._first_S.item(sample), self._first_S.item(sample + 1))
        return [IndexedMember(self.suffixes[suffix(m)], offset(m), size(m), crc(m)) for m in numbers]

    def same_keys(self, other: "ShardIndex") -> bool:
        return np.array_equal(self._key_S, other._key_S) and np.array_equal(self._keys, other._keys)

    def _check(self, sample: int) -> None:
        if not 0 <= sample < self.count:
            raise IndexError(f"{self.path.name} has {self.count} samples, asked for number {sample}")

    def check(self) -> None:
        """Raise StaleIndexError if the index does not fit the shard as it is now.

        This looks at the shard's size and, by their checksums, at a few members, at more where its time has changed.
        Where most do not fit, the shard was replaced; where few do not, it was damaged, and the index shall tell so.
        """
        now = os.stat(self.path)
        if now.st_size != self.size:
            raise StaleIndexError(f"was made of {self.size} bytes, the shard has {now.st_size}")
        members, looks = len(self._offset_M), 3 if now.st_mtime_ns == self.mtime_ns else 64
        places = np.unique(np.linspace(0, members - 1, looks).astype(np.int64)) if members else np.zeros(0, np.int64)
        places = places[self._size_M[places] <= _CHECKED_BYTES].tolist()
        wrong = 0
        with self.path.open("rb", buffering=0) as file:
            for m in places:
                data = os.pread(file.fileno(), int(self._size_M[m]), int(self._offset_M[m]))
                wrong += zlib.crc32(data) != self._crc_M[m]
        if 2 * wrong > len(places):
            raise StaleIndexError("does not fit the shard's content, which was replaced since")
        if wrong:
            log.warning("%s is damaged: %d of %d members looked at do not fit their checksum, and will be left out",
                        self.path, wrong, len(places))  # fmt: skip


def index_shard(path: Path | str, *, folder: Path | None = None) -> ShardIndex:
    """Read a shard once and write its index beside it, or into `folder` where that cannot be done.

    Damage inside the shard costs the samples it touches and is listed in `problems`. Raises ShardError if nothing of
    the shard can be used, or a name occurs twice.
    """
    path = Path(path)
    try:
        with path.open("rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            found = walk(file, stat.st_size)
    except OSError as e:
        what = f"cannot be read ({e.strerror or e}); check the path and its permissions"
        raise ShardError([(str(path), f"{what}; --data names shards of a run that have moved")]) from None
    if not found.headers:
        raise ShardError([(str(path), _not_a_tar(path, stat.st_size))])
    samples, twice = group(found)
    if twice:
        names = ", ".join(twice[:5]) + (" ..." if len(twice) > 5 else "")
        what = f"{len(twice)} file names occur twice ({names}); a key may stand once in a shard: write it again"
        raise ShardError([(str(path), what)])
    keys = [sample.key.decode("utf-8", "backslashreplace").encode() for sample in samples]
    if not samples or len(set(keys)) < len(keys):
        what = (
            "two keys differ only in escapes"
            if samples
            else f"holds no sample ({_told(found.causes) or 'it is empty'})"
        )
        raise ShardError([(str(path), f"{what}; wanted files named KEY.SUFFIX, such as 000001.jpg and 000001.txt")])
    lost = [sample for sample in samples if sample.incomplete]
    for sample in lost:
        found.note("incomplete sample", sample.key, sample.incomplete)
    if found.causes:
        first = found.problems[0]
        log.warning("%s: %d of %d samples are incomplete and cannot be used (%s); first: %s, %s, %s", path, len(lost),
                    len(samples), _told(found.causes), *first)  # fmt: skip
    index = ShardIndex(path, _packed(samples, keys, found, stat.st_mtime_ns), None)
    for where in _places(path, folder):
        try:
            where.parent.mkdir(parents=True, exist_ok=True)
            _write(where, index.data)
            return _map(path, where)
        except OSError as e:
            log.info("the index of %s cannot be kept as %s: %s", path, where, e)
    log.warning("the index of %s cannot be kept anywhere, and is made again each time", path)
    return index


def open_index(path: Path | str, *, build: bool = True, folder: Path | None = None) -> ShardIndex:
    """The index of a shard; built if there is none, built again if it is damaged, half written, stale or of another
    version. Raises ShardError as `index_shard` does, and if there is no index and `build` is False."""
    path = Path(path)
    for where in _places(path, folder):
        try:
            if not where.is_file():
                continue
            index = _map(path, where)
            index.check()
            return index
        except StaleIndexError as e:
            log.warning("the index %s %s; %s", where, e, "it is built again" if build else "it is not used")
        except OSError as e:
            what = f"cannot be read ({e.strerror or e}); check the path and its permissions"
            raise ShardError([(str(path), what)]) from None
    if not build:
        raise ShardError([(str(path), "has no index; make one with `mmpre data index`")])
    log.info("indexing %s", path)
    return index_shard(path, folder=folder)


def cache_folder() -> Path:
    """Where fetched shards go, and indexes that cannot stand beside their shards."""
    if own := os.environ.get("MMPRE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmpre"


def _places(path: Path, folder: Path | None) -> list[Path]:
    """Shards of one name in two folders never share an index."""
    known = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    return [path.with_name(f"{path.name}.idx"), (folder or cache_folder()) / f"{path.name}-{known}.idx"]


def _packed(samples: Sequence[Grouped], keys: Sequence[bytes], found: Walk, mtime_ns: int) -> np.ndarray:
    suffixes: dict[bytes, int] = {}
    rows, first, key_end = [], [0], [0]
    for sample, key in zip(samples, keys, strict=True):
        for suffix, member in sample.members.items():
            if not member.lost:
                rows.append((member.offset, member.size, member.crc, suffixes.setdefault(suffix, len(suffixes))))
        first.append(len(rows))
        key_end.append(key_end[-1] + len(key))
    offset_M, size_M, crc_M, suffix_M = zip(*rows, strict=True) if rows else ((), (), (), ())
    whole_S = [not sample.incomplete for sample in samples]
    names = {"suffixes": [printable(suffix) for suffix in suffixes], "problems": found.problems, "causes": found.causes}
    columns = [(offset_M, "<i8"), (size_M, "<i8"), (first, "<i8"), (key_end, "<i8"), (crc_M, "<u4"), (suffix_M, "<u4"),
               (whole_S, "u1")]  # fmt: skip
    parts = [np.array(values, dtype=kind).tobytes() for values, kind in columns]
    parts += [b"".join(keys), json.dumps(names).encode()]
    numbers = (found.size, mtime_ns, len(rows), len(samples), len(parts[-2]), len(parts[-1]))
    head = _HEAD.pack(_MAGIC, VERSION, bytes(32), *numbers, bytes.fromhex(found.digest))
    data = np.frombuffer(bytearray(head + b"".join(parts)), dtype=np.uint8)
    data[_OWN] = np.frombuffer(_own_digest(data), dtype=np.uint8)
    return data


def _own_digest(data: np.ndarray) -> bytes:
    return hashlib.sha256(bytes(data[: _OWN.start]) + data[_OWN.stop :].tobytes()).digest()


def _write(where: Path, data: np.ndarray) -> None:
    aside = where.with_name(f".{where.name}.{uuid.uuid4().hex[:12]}")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, where)
    finally:
        aside.unlink(missing_ok=True)


def _map(path: Path, where: Path) -> ShardIndex:
    size = where.stat().st_size
    if size < _HEAD.size:
        raise StaleIndexError(f"is cut: {size} bytes")
    # torch's mapping, unlike numpy's, holds no file handle: thousands of shards may be open
    return ShardIndex(path, torch.from_file(str(where), shared=False, size=size, dtype=torch.uint8).numpy(), where)


def _map_again(path: Path, where: Path, digest: str) -> ShardIndex:
    index = _map(path, where)
    if index.digest != digest:
        raise ShardError([(str(path), f"its index {where} was replaced while it was in use; start again")])
    return index


def _not_a_tar(path: Path, size: int) -> str:
    with path.open("rb") as file:
        start = file.read(64)
    if not size:
        return "is empty (0 bytes); download or write it again"
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return "is compressed; members are read by their place, so unpack it to a plain .tar first"
    if not start.strip(b"\0"):
        return "holds no sample (only zero bytes); download or write it again"
    page = " (a web page: the download went wrong)" if start.lstrip()[:1] == b"<" else ""
    return f"wanted a tar, its first bytes are {start[:24]!r}{page}; download or write it again"


def _told(causes: Mapping[str, int]) -> str:
    return ", ".join(f"{cause}: {count}" for cause, count in causes.items())
