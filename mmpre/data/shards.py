"""Read samples of indexed shards by their number, and join sidecars to them. Nothing is decoded or unpickled here.

A tar's headers are not looked at again: members are read by their place and checked by their CRC-32. Damage costs its
sample (`CorruptSample`); storage that fails is tried again and then stops the run (`StorageError`), for a sample that
cannot be read today is no broken sample.
"""

import errno
import hashlib
import json
import os
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from mmpre.aside import file_aside
from mmpre.data.index import ShardError, Shards, open_index
from mmpre.data.remote import StorageError
from mmpre.data.shard_index import IndexedMember, ShardIndex
from mmpre.data.shard_writer import ShardSink, shard_writer
from mmpre.data.tar import printable

__all__ = ["CorruptSample", "ShardReader", "ShardSink", "Sidecar", "StorageError", "record_sidecar", "shard_writer"]
_SIDECAR = "sidecar.json"
_SIDECAR_FORMAT = 1
_GAP_BYTES = 64 << 10  # members nearer than this are read at once


class CorruptSample(ValueError):
    """A sample that was damaged. `cause` is a short, countable name; `shard` the shard's file name."""

    def __init__(self, cause: str, shard: str, key: str, member: str, detail: str) -> None:
        super().__init__(cause, shard, key, member, detail)
        self.cause, self.shard, self.key, self.member, self.detail = cause, shard, key, member, detail

    def __str__(self) -> str:
        name = f"{self.key}.{self.member}" if self.member else self.key
        return f"{printable(self.shard)}: {printable(name)}: {self.cause}, {self.detail}"


class ShardReader:
    """Reads samples by number. Picklable: open files stay behind and are opened again where they are needed.

    `files` shards are held open at most; a read that fails is tried `tries` times, `wait_s`, 4 * `wait_s` ... apart.
    """

    def __init__(self, shards: Shards, *, files: int = 32, tries: int = 4, wait_s: float = 0.1) -> None:
        if files < 1 or tries < 1:
            raise ValueError(f"ShardReader: files and tries must be at least 1, got {files} and {tries}")
        self.shards, self.files, self.tries, self.wait_s = shards, files, tries, wait_s
        self._open: OrderedDict[Path, BinaryIO] = OrderedDict()

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_open": OrderedDict()}

    def read(self, sample: int) -> dict[str, bytes]:
        """The members of a sample by suffix. Raises CorruptSample for a damaged one, StorageError if reading fails."""
        index, local = self.shards.locate(sample)
        return self.read_local(index, local)

    def read_local(self, index: ShardIndex, local: int) -> dict[str, bytes]:
        if not index.complete(local):
            detail = "a member of it was lost before the shard was indexed; write the shard again to have it back"
            raise CorruptSample("incomplete sample", index.path.name, index.key(local), "", detail)
        members = index.members(local)
        found = {}
        for run in _runs(members):
            start = run[0].offset
            data = self._bytes(index, start, run[-1].offset + run[-1].size - start)
            for suffix, offset, size, crc in run:
                content = data[offset - start : offset - start + size]
                if zlib.crc32(content) != crc:
                    content = self._again(index, local, suffix, offset, size, crc)
                found[suffix] = content
        return {member.suffix: found[member.suffix] for member in members}

    def _again(self, index: ShardIndex, local: int, suffix: str, offset: int, size: int, crc: int) -> bytes:
        """Only what is wrong twice, by a newly opened file, is damage."""
        self._close(index.path)
        content = self._bytes(index, offset, size)
        if zlib.crc32(content) != crc:
            detail = f"its {size} bytes do not fit their CRC-32; copy the shard again, or write and index it anew"
            raise CorruptSample("checksum", index.path.name, index.key(local), suffix, detail)
        return content

    def _bytes(self, index: ShardIndex, offset: int, size: int) -> bytes:
        failed: Exception | None = None
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.wait_s * 4 ** (attempt - 1))
            try:
                file = self._file(index)
                data = _pread(file, offset, size)
                if len(data) == size:
                    return data
                self._same_size(index, file)
                failed = OSError(f"got {len(data)} of {size} bytes")
            except StorageError:
                raise
            except OSError as e:
                failed = e
                if e.errno in (errno.EMFILE, errno.ENFILE):
                    self.close()
            self._close(index.path)
        how = "raise the limit of open files (ulimit -n)" if _too_many(failed) else "check the storage, then resume"
        raise StorageError(
            f"{index.path}: reading {size} bytes at {offset} failed {self.tries} times: {failed}; {how}"
        ) from failed

    def _file(self, index: ShardIndex) -> BinaryIO:
        file = self._open.get(index.path)
        if file is not None:
            self._open.move_to_end(index.path)
            return file
        while len(self._open) >= self.files:
            self._open.popitem(last=False)[1].close()
        file = index.path.open("rb", buffering=0)
        try:
            self._same_size(index, file)
        except StorageError:
            file.close()
            raise
        self._open[index.path] = file
        return file

    def _same_size(self, index: ShardIndex, file: BinaryIO) -> None:
        size = os.fstat(file.fileno()).st_size
        if size != index.size:
            what = f"has {size} bytes, {index.size} when it was indexed; put the shard back, or start a new run"
            raise StorageError(f"{index.path}: changed since it was indexed: {what}")

    def _close(self, path: Path) -> None:
        file = self._open.pop(path, None)
        if file is not None:
            file.close()

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def verify(self) -> None:
        """Read all shards whole and compare their digests. Raises one ShardError that lists those that changed."""
        problems = []
        for index in self.shards.indexes:
            try:
                with index.path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as e:
                problems.append((str(index.path), f"cannot be read ({e.strerror or e})"))
                continue
            if digest != index.digest:
                what = f"its SHA-256 is {digest[:12]}..., {index.digest[:12]}... when it was indexed"
                problems.append((str(index.path), f"{what}; copy it again, or index it anew and start a new run"))
        if problems:
            raise ShardError(problems)


class Sidecar:
    """Members that were computed from shards, in a folder of tars of the same names, keys and order.

    `sidecar.json` there says which shards they were made of, and which samples have none ("holes").
    Raises ShardError if it belongs to other shards, or a key is missing or too many.
    """

    def __init__(self, folder: Path | str, shards: Shards) -> None:
        self.folder, self.shards = Path(folder), shards
        made_of, holes = _read_record(self.folder)
        indexes, self._places, problems = [], [], []
        for index in shards.indexes:
            name = index.path.name
            try:
                if made_of.get(name) != index.digest:
                    came = (
                        "it names no such shard" if name not in made_of else "it was made of another shard of that name"
                    )
                    raise ShardError(
                        [(str(self.folder / name), f"is no sidecar of {index.path}: {came}; make it again")]
                    )
                beside = open_index(self.folder / name)
                indexes.append(beside)
                self._places.append(_match(index, beside, frozenset(holes.get(name, ()))))
            except ShardError as e:
                problems += e.problems
        if problems:
            raise ShardError(problems)
        self.reader = ShardReader(Shards(indexes))

    def read(self, sample: int) -> dict[str, bytes]:
        """The extra members of the main shards' sample of that number."""
        shard = self.shards.place(sample)
        index, local = self.shards.locate(sample)
        places = self._places[shard]
        if places is not None:
            if index.key(local) not in places:
                detail = f"{self.folder} has nothing for it"
                raise CorruptSample("hole in sidecar", index.path.name, index.key(local), "", detail)
            local = places[index.key(local)]
        return self.reader.read_local(self.reader.shards.indexes[shard], local)


def record_sidecar(folder: Path | str, shards: Shards, *, holes: Mapping[str, Sequence[str]] | None = None) -> None:
    """Say in `sidecar.json` which shards a folder of tars was made of; `holes` are keys by shard that have nothing."""
    record = {
        "format": _SIDECAR_FORMAT,
        "shards": {index.path.name: index.digest for index in shards.indexes},
        "holes": {shard: list(keys) for shard, keys in (holes or {}).items()},
    }
    if len(record["shards"]) < len(shards.indexes):
        raise ShardError([(str(folder), "a sidecar needs shards of different file names; rename them")])
    with file_aside(Path(folder) / _SIDECAR) as aside:  # several processes may make one
        aside.write_text(json.dumps(record, indent=1) + "\n")


def _read_record(folder: Path) -> tuple[Mapping[str, str], Mapping[str, Sequence[str]]]:
    path = folder / _SIDECAR
    try:
        record = json.loads(path.read_bytes())
        if record["format"] != _SIDECAR_FORMAT:
            raise ShardError([(str(path), f"has format {record['format']}, wanted {_SIDECAR_FORMAT}; make it again")])
        return dict(record["shards"]), dict(record["holes"])
    except OSError as e:
        what = f"cannot be read ({e.strerror or e}); a sidecar folder holds it beside its tars"
        raise ShardError([(str(path), what)]) from None
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        if isinstance(e, ShardError):
            raise
        raise ShardError([(str(path), f"is not what a sidecar says of itself ({e}); make it again")]) from None


def _match(main: ShardIndex, beside: ShardIndex, holes: frozenset[str]) -> dict[str, int] | None:
    """Where each key of a shard stands in its sidecar; None where they are the same, number by number."""
    if main.same_keys(beside):
        return None
    wanted = [key for key in map(main.key, range(len(main))) if key not in holes]
    have = [beside.key(i) for i in range(len(beside))]
    if wanted != have:
        missing, extra = sorted(set(wanted) - set(have)), sorted(set(have) - set(wanted))
        what = f"{len(missing)} keys of {main.path} are missing" + (f" ({_some(missing)})" if missing else "")
        what += f", {len(extra)} are not of it" + (f" ({_some(extra)})" if extra else "")
        raise ShardError([(str(beside.path), f"{what}, or their order differs; make the sidecar again")])
    return {key: i for i, key in enumerate(have)}


def _some(keys: Sequence[str]) -> str:
    return ", ".join(printable(key) for key in keys[:3]) + (" ..." if len(keys) > 3 else "")


def _runs(members: Sequence[IndexedMember]) -> Iterator[list[IndexedMember]]:
    """Members that stand close together, to be read at once."""
    run: list[IndexedMember] = []
    for member in sorted(members, key=lambda member: member.offset):
        if run and not 0 <= member.offset - (run[-1].offset + run[-1].size) <= _GAP_BYTES:
            yield run
            run = []
        run.append(member)
    if run:
        yield run


def _pread(file: BinaryIO, offset: int, size: int) -> bytes:
    """`size` bytes at a place, or fewer at the end of the file."""
    parts, have = [], 0
    while have < size:
        part = os.pread(file.fileno(), size - have, offset + have)
        if not part:
            break
        parts.append(part)
        have += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_many(failed: Exception | None) -> bool:
    return isinstance(failed, OSError) and failed.errno in (errno.EMFILE, errno.ENFILE)
