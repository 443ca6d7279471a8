"""Shards in a given order, as one numbered list of samples.

A shard is a plain tar as WebDataset writes and reads them; it is indexed once (`shard_index.py`) and after that its
members are read by their place. A sample is known by its number here, and everywhere by (shard digest, key).
"""

import glob
import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np

from mmpre.data.remote import Remote, check_scheme, scheme_of, without_secrets
from mmpre.data.shard_index import ShardError, ShardIndex, cache_folder, index_shard, open_index

__all__ = ["ShardError", "ShardIndex", "Shards", "expand_shards", "index_shard", "open_index", "open_shards"]
log = logging.getLogger(__name__)
_MAX_BRACES = 1_000_000
_FETCHERS = 8


class Shards:
    """The samples of some shards, numbered through in the order given. Picklable."""

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        self.indexes = tuple(indexes)
        self.before = np.cumsum([0, *(len(index) for index in self.indexes)])  # samples before each shard, then all
        self.count = int(self.before[-1])
        # of what the shards hold, not where they are
        self.fingerprint = hashlib.sha256("".join(index.digest for index in self.indexes).encode()).hexdigest()

    def __len__(self) -> int:
        return self.count

    def locate(self, sample: int) -> tuple[ShardIndex, int]:
        """The shard of a sample, and its number there."""
        shard = self.place(sample)
        return self.indexes[shard], sample - int(self.before[shard])

    def place(self, sample: int) -> int:
        """The place in the list of the shard that holds a sample."""
        if not 0 <= sample < self.count:
            raise IndexError(f"the shards hold {self.count} samples, asked for number {sample}")
        return int(self.before.searchsorted(sample, side="right")) - 1

    def number(self, shard: int, local: int) -> int:
        """The number of a sample of the shard at a place in the list; the way back from `locate`."""
        if not 0 <= local < len(self.indexes[shard]):
            raise IndexError(
                f"{self.indexes[shard].path.name} has {len(self.indexes[shard])} samples, asked for {local}"
            )
        return int(self.before[shard]) + local

    def key(self, sample: int) -> str:
        index, local = self.locate(sample)
        return index.key(local)

    def identity(self, sample: int) -> tuple[str, str]:
        """The digest of a sample's shard and its key: the same wherever the shard lies."""
        index, local = self.locate(sample)
        return index.digest, index.key(local)

    @property
    def cache(self) -> Path:
        """The folder that what is computed from these shards is kept in: where the first one's index is."""
        where = self.indexes[0].where
        return where.parent if where else cache_folder()

    def shares(self) -> dict[str, float]:
        """Each shard's share of the samples, by file name: how many rows of an epoch come from it."""
        shares: Counter[str] = Counter()
        for index in self.indexes:
            shares[index.path.name] += len(index) / self.count
        return dict(shares)

    def problems(self) -> dict[str, dict[str, int]]:
        """How often each cause of loss was met, by shard; only shards with losses."""
        return {str(index.path): dict(index.causes) for index in self.indexes if index.causes}


def open_shards(urls: Sequence[str | Path] | str | Path, *, build: bool = True, folder: Path | None = None) -> Shards:
    """Open shards in the order given; each of `urls` is a path, a folder, a glob, or has braces (`a-{000..009}.tar`).

    Shards without a valid index are indexed first. Raises one ShardError that lists all shards that cannot be used.
    """
    paths, problems = _expand([urls] if isinstance(urls, str | Path) else urls)
    paths, missing = _fetched(paths, folder)
    problems += missing
    indexes = []
    for path in paths:
        try:
            indexes.append(open_index(path, build=build, folder=folder))
        except ShardError as e:
            problems += e.problems
    if problems or not indexes:
        raise ShardError(problems or [("shards", "none were given; give a path, a folder or a pattern")])
    copies = [digest for digest, count in Counter(index.digest for index in indexes).items() if count > 1]
    for digest in copies[:5]:
        same = ", ".join(str(index.path) for index in indexes if index.digest == digest)
        log.warning("shards with the same content: %s; their samples are seen more often", same)
    return Shards(indexes)


def _fetched(paths: Sequence[Path | str], folder: Path | None) -> tuple[list[Path], list[tuple[str, str]]]:
    """Local copies in place of urls, and what is wrong with those that have none."""
    problems: list[tuple[str, str]] = []

    def local(path: Path | str) -> Path | None:
        try:
            return path if isinstance(path, Path) else Remote(folder).fetch(path)
        except ShardError as e:
            problems.extend(e.problems)
            return None

    with ThreadPoolExecutor(_FETCHERS) as pool:
        return [path for path in pool.map(local, paths) if path is not None], problems


def expand_shards(urls: Sequence[str | Path]) -> list[Path]:
    """The shard files that paths, folders, globs, brace patterns and urls (their copies) name. Raises ShardError for
    what names none."""
    paths, problems = _expand(urls)
    paths, missing = _fetched(paths, None)
    problems += missing
    if problems:
        raise ShardError(problems)
    return paths


def _expand(urls: Sequence[str | Path]) -> tuple[list[Path | str], list[tuple[str, str]]]:
    paths: list[Path | str] = []
    problems: list[tuple[str, str]] = []
    for url in urls:
        try:
            paths += _paths(os.fspath(url))
        except ShardError as e:
            problems += e.problems
    counts = Counter(path if isinstance(path, str) else os.path.abspath(path) for path in paths)
    problems += [
        (without_secrets(path) if scheme_of(path) else path, f"is given {n} times; give each shard once")
        for path, n in counts.items()
        if n > 1
    ]
    return paths, problems


def _paths(url: str) -> list[Path | str]:
    """Local files, and urls of shards that must be fetched, which stay text."""
    if not url or "\0" in url:
        raise ShardError([(repr(url), "is no path; give a file, a folder or a pattern")])
    scheme = scheme_of(url)
    if scheme == "file":
        url = unquote(urlsplit(url).path)
    elif scheme and (scheme == "pipe" or not os.path.exists(url)):
        check_scheme(url)
        if glob.has_magic(url.partition("?")[0]):
            what = "has a pattern, which only local paths may have; name the shards with braces, as in a-{000..009}.tar"
            raise ShardError([(without_secrets(url), what)])
        return list(_braces(url))
    if os.path.exists(url):
        return _folder(Path(url)) if os.path.isdir(url) else [Path(url)]
    found = []
    for one in _braces(url):
        if not glob.has_magic(one):
            found += _folder(Path(one)) if os.path.isdir(one) else [Path(one)]  # a missing one is named when opened
            continue
        matches = [Path(match) for match in sorted(glob.glob(one)) if not match.endswith(".idx")]
        if not matches:
            raise ShardError([(one, "matches no file; check the pattern and the folder")])
        found += matches
    return found


def _folder(folder: Path) -> list[Path]:
    found = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not found:
        below = sorted({path.parent.name for path in folder.glob("*/*.tar")})
        way_out = f"give one of its folders {', '.join(below)}" if below else "`mmpre data pack` makes shards of files"
        raise ShardError([(str(folder), f"holds no *.tar file; {way_out}")])
    return found


def _braces(pattern: str) -> Iterator[str]:
    """Expand {000..009} and {a,b}; a range keeps the width of its first number."""
    pieces = re.split(r"(\{[^{}]*\})", pattern)
    choices: list[list[str]] = []
    for piece in pieces:
        numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", piece)
        if numbers:
            first, last = int(numbers[1]), int(numbers[2])
            if not first <= last < first + _MAX_BRACES:
                raise ShardError([(pattern, f"{piece} must rise and name at most {_MAX_BRACES} shards")])
            choices.append([f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1)])
        elif piece.startswith("{") and "," in piece:
            choices.append(piece[1:-1].split(","))
        else:
            choices.append([piece])
    return ("".join(parts) for parts in product(*choices))
