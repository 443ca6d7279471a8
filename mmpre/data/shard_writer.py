"""Write shards that any WebDataset reader reads; the same samples give the same bytes."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import webdataset

from mmpre.data.index import index_shard
from mmpre.data.tar import printable


class ShardSink:
    """Takes samples and writes them to shards `<prefix>-<number>.tar` in turn; `paths` are the shards that are whole.

    Made by `shard_writer`. A shard is written aside, gets its name when it is whole, and is indexed then.
    """

    def __init__(self, folder: Path, prefix: str, maxcount: int, maxsize: int, start: int) -> None:
        self.folder, self.prefix, self.maxcount, self.maxsize, self.start = folder, prefix, maxcount, maxsize, start
        self.paths: list[Path] = []
        self._writer: webdataset.ShardWriter | None = None
        self._file: BinaryIO | None = None
        self._keys: set[str] = set()

    def write(self, sample: Mapping[str, str | bytes]) -> None:
        """Write a sample: its `__key__`, and members by suffix (text is written as UTF-8).

        Raises ValueError for a key or suffix that would not be read back as it is, or a key that was there before.
        """
        key = _checked(sample)
        if self._writer is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            pattern = os.fspath(self.folder / self.prefix).replace("%", "%%") + "-%06d.tar"
            self._writer = webdataset.ShardWriter(
                pattern, maxcount=self.maxcount, maxsize=self.maxsize, start_shard=self.start, post=self._finish,
                opener=self._begin, verbose=0, encoder=False, mtime=0, user="", group="", mode=0o644,
            )  # fmt: skip
        if key in self._keys:
            raise ValueError(f"shard_writer: key {printable(key)} was written before; a key may stand once")
        self._keys.add(key)
        text = {name: value.encode() for name, value in sample.items() if isinstance(value, str) and name != "__key__"}
        self._writer.write({**sample, **text})

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def abandon(self) -> None:
        """Give up the shard that is not whole yet."""
        self._writer = None
        if self._file is not None:
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
            self._file = None

    def _begin(self, name: str) -> BinaryIO:
        path = Path(name)
        if path.exists():
            raise FileExistsError(f"shard_writer: {path} exists already; give an empty folder or remove it")
        self._file = path.with_name(f".{path.name}.part").open("wb")
        return self._file

    def _finish(self, name: str) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._file.name, name)
        self._file = None
        index_shard(name)
        self.paths.append(Path(name))


@contextmanager
def shard_writer(
    folder: Path | str, *, prefix: str = "shard", maxcount: int = 10_000, maxsize: int = 1 << 30, start: int = 0
) -> Iterator[ShardSink]:
    """Write samples to shards: `with shard_writer(out) as sink: sink.write({"__key__": "a", "txt": "..."})`.

    A new shard is begun after `maxcount` samples or `maxsize` bytes of members; numbers count from `start`. Leaving
    by an exception gives up the shard that is not whole. Raises FileExistsError rather than writing over a shard.
    """
    if maxcount < 1 or maxsize < 1 or start < 0:
        raise ValueError(
            f"shard_writer: maxcount and maxsize must be at least 1, start 0; got {maxcount}, {maxsize}, {start}"
        )
    sink = ShardSink(Path(folder), prefix, maxcount, maxsize, start)
    try:
        yield sink
        sink.close()
    finally:
        sink.abandon()


def _checked(sample: Mapping[str, str | bytes]) -> str:
    key = sample.get("__key__")
    if not isinstance(key, str) or not key:
        raise ValueError(f"shard_writer: a sample needs a __key__ of text, got {key!r}")
    folders, _, base = key.rpartition("/")
    if "." in base or not base or not key.isprintable() or key.startswith(("/", "__")) or ".." in folders.split("/"):
        what = "wanted a relative name without dots in its last part, not beginning with __"
        raise ValueError(f"shard_writer: key {printable(key)!r} would not be read back as it is: {what}")
    suffixes = [suffix for suffix in sample if suffix != "__key__"]
    for suffix in suffixes:
        if suffix != suffix.lower() or not suffix.isprintable() or "/" in suffix or suffix[:1] in ("", "_", "."):
            what = "wanted lower case, not beginning with _ or a dot, without /"
            raise ValueError(f"shard_writer: {printable(key)}: suffix {suffix!r} would not be read back: {what}")
        if not isinstance(sample[suffix], str | bytes):
            kind = type(sample[suffix]).__name__
            raise TypeError(
                f"shard_writer: {printable(key)}.{suffix} must be bytes or text, got {kind}; encode it first"
            )
    if not suffixes:
        raise ValueError(f"shard_writer: sample {printable(key)} has no members")
    return key
