"""Shards that lie elsewhere: whole copies in a cache, filled once and verified before they are used.

An entry is known by the digest of its url and of what the server says of the content (size, etag, time of change), so
nothing is shared by file name and a shard that was replaced is another entry. It is filled aside, under a lock, and
renamed; an interrupted fill goes on where it stopped. http and https are read by Python's own library, other schemes
by fsspec where it knows them. Environment variables that rewrite urls are not looked at.
"""

import base64
import fcntl
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit, urlunsplit

from mmpre.data.shard_index import ShardError, cache_folder

log = logging.getLogger(__name__)
LIMIT = "MMPRE_CACHE_GB"
TIMEOUT_S = 60.0  # that a server may be silent
_CHUNK = 1 << 20
_META = "entry.json"
_GONE = (400, 401, 403, 404, 405, 410, 451)  # another try gives the same answer
_verified: set[Path] = set()
_verifying = threading.Lock()


class StorageError(OSError):
    """A shard cannot be read, after several tries, or has changed since it was indexed."""


def scheme_of(url: str) -> str | None:
    """The scheme of a url in lower case, None for a plain path (C:\\ is none)."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", url)
    return found[1].lower() if found else None


def without_secrets(url: str) -> str:
    """A url without user, password, query and fragment, which may hold tokens; NAME@WEIGHT= before it stays."""
    source = re.match(r"[A-Za-z][\w-]*@[^=/]*=|", url)[0]
    parts = urlsplit(url.removeprefix(source))
    return f"{source}{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"


def public(value: Any) -> Any:
    """A value, such as a list of shards, without the secrets of the urls in it: for what is written down or shown."""
    if isinstance(value, Mapping):
        return {name: public(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [public(one) for one in value]
    return without_secrets(value) if isinstance(value, str) and "://" in value else value


def check_scheme(url: str) -> None:
    """Raise ShardError for a url that cannot be fetched at all."""
    scheme = scheme_of(url)
    if scheme == "pipe":
        what = "is a `pipe:` url, which would run its text as a shell command; download the shard and give its path"
        raise ShardError([("pipe:...", f"{what}. Data is never allowed to run code")])
    if scheme in ("http", "https"):
        return
    from fsspec.registry import known_implementations

    if scheme not in known_implementations or "::" in url:
        what = f"{scheme}: urls are not known; give http(s), a scheme of fsspec such as s3, or download the shards"
        raise ShardError([(without_secrets(url), what)])


@dataclass(frozen=True)
class Remote:
    """Fetches shards. A try that fails is made `tries` times, `wait_s`, 4 * `wait_s` ... apart."""

    folder: Path | None = None
    tries: int = 4
    wait_s: float = 0.5

    @property
    def root(self) -> Path:
        return (self.folder or cache_folder()) / "shards"

    def fetch(self, url: str) -> Path:
        """The whole shard as a local file, from the cache where it is there.

        Raises ShardError for a shard that is not there or may not be read, StorageError where the storage fails.
        """
        place = self.root / hashlib.sha256(url.encode()).hexdigest()[:32]
        failed: Exception | None = None
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.wait_s * 4 ** (attempt - 1))
            try:
                with _source(url) as source, _lock(place):
                    return self._entry(url, place, source)
            except (ShardError, StorageError):
                raise
            except FileNotFoundError as e:
                raise ShardError([(without_secrets(url), f"is not there ({_told(e)}); check the url")]) from None
            except PermissionError as e:
                what = f"may not be read ({_told(e)}); give the credentials that it wants"
                raise ShardError([(without_secrets(url), what)]) from None
            except (OSError, http.client.HTTPException) as e:  # connections, timeouts, cut answers
                failed = e
        kept = sorted(place.glob(f"*/{_META}"), key=lambda path: path.stat().st_mtime)
        for meta in reversed(kept):
            if (path := _verify(meta.parent)) is not None:
                log.warning("%s cannot be reached (%s); its copy in the cache is used", without_secrets(url), failed)
                return path
        raise StorageError(
            f"{without_secrets(url)}: fetching failed {self.tries} times: {failed}; check the network and the server, "
            "then start again: what was fetched is kept"
        )

    def _entry(self, url: str, place: Path, source: "Source") -> Path:
        facts = hashlib.sha256(json.dumps(source.facts, sort_keys=True).encode()).hexdigest()[:32]
        entry = place / facts
        if (found := _verify(entry)) is not None:
            return found
        self._make_room(url, source.size)
        entry.mkdir(parents=True, exist_ok=True)
        part = entry / ".part"
        with part.open("ab") as file:
            have = file.tell()
            if source.size is not None and have > source.size:
                file.truncate(0)
                have = 0
            with source.open(have) as (data, start):
                if start != have:  # the server gives the whole again
                    file.truncate(start)
                shutil.copyfileobj(data, file, _CHUNK)
            file.flush()
            os.fsync(file.fileno())
            have = file.tell()
        if source.size is not None and have < source.size:
            raise ConnectionError(f"got {have:,} of {source.size:,} bytes")
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        path = entry / _name(url)
        told = {"url": without_secrets(url), "name": path.name, "size": have, "sha256": digest, "facts": source.facts}
        os.replace(part, path)
        aside = entry / f".{_META}"
        aside.write_text(json.dumps(told, indent=1) + "\n")
        os.replace(aside, entry / _META)  # last: an entry without it is not whole
        with _verifying:
            _verified.add(path)
        log.info("fetched %s, %s bytes", told["url"], f"{have:,}")
        return path

    def _make_room(self, url: str, size: int | None) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        free, wanted = shutil.disk_usage(self.root).free, size or 0
        way_out = "make room, or `mmpre data cache --clear`"
        if wanted > free:
            raise StorageError(f"{without_secrets(url)}: needs {wanted:,} bytes, {self.root} has {free:,}; {way_out}")
        limit = os.environ.get(LIMIT)
        if limit and sum(one["size"] for one in entries(self.folder)) + wanted > float(limit) * 1e9:
            raise StorageError(
                f"{without_secrets(url)}: its {wanted:,} bytes would not fit the cache {self.root}, which {LIMIT} "
                f"limits to {limit} GB; raise it, or `mmpre data cache --clear`"
            )


def entries(folder: Path | None = None) -> list[dict[str, Any]]:
    """What the cache holds: url, size, digest and place of each whole shard."""
    found = []
    for meta in sorted(((folder or cache_folder()) / "shards").glob(f"*/*/{_META}")):
        try:
            found.append(json.loads(meta.read_bytes()) | {"path": str(meta.parent)})
        except (OSError, ValueError):
            continue
    return found


def clear(folder: Path | None = None) -> int:
    """Remove all fetched shards; returns how many bytes that gave back. Not while a run reads them."""
    freed = sum(one["size"] for one in entries(folder))
    shutil.rmtree((folder or cache_folder()) / "shards", ignore_errors=True)
    with _verifying:
        _verified.clear()
    return freed


def _verify(entry: Path) -> Path | None:
    """An entry's file if it is whole, looked at once in this process; an entry that does not fit is removed."""
    try:
        told = json.loads((entry / _META).read_bytes())
        path = entry / Path(told["name"]).name
        with _verifying:
            if path in _verified and path.stat().st_size == told["size"]:
                return path
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == told["sha256"]:
                with _verifying:
                    _verified.add(path)
                return path
        log.warning("%s does not fit its digest any more; it is fetched again", path)
    except FileNotFoundError:
        if not (entry / _META).exists():
            return None
    except (ValueError, KeyError, TypeError):
        log.warning("%s cannot be read; it is fetched again", entry / _META)
    shutil.rmtree(entry, ignore_errors=True)
    return None


@contextmanager
def _lock(place: Path) -> Iterator[None]:
    """One filler at a time; the system gives the lock back when its owner ends."""
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Source:
    """A shard at its place: what is known of its content, and its bytes from a place on."""

    size: int | None
    facts: Mapping[str, str | int | None]

    @contextmanager
    def open(self, have: int) -> Iterator[tuple[BinaryIO, int]]:
        """The bytes, and from which place on they are: `have`, or 0 where the server gives only the whole."""
        raise NotImplementedError
        yield


@contextmanager
def _source(url: str) -> Iterator[Source]:
    if scheme_of(url) in ("http", "https"):
        with _get(url) as answer:
            yield _Http(url, answer)
    else:
        yield _Fsspec(url)


class _Http(Source):
    def __init__(self, url: str, answer: http.client.HTTPResponse) -> None:
        self.url, self.answer = url, answer
        length = answer.headers.get("Content-Length", "")
        self.size = int(length) if length.isdigit() else None
        self.facts = {"size": self.size, **{name: answer.headers.get(name) for name in ("ETag", "Last-Modified")}}

    @contextmanager
    def open(self, have: int) -> Iterator[tuple[BinaryIO, int]]:
        if not have:
            yield self.answer, 0
            return
        if have == self.size:
            yield _Empty(), have
            return
        with _get(self.url, {"Range": f"bytes={have}-"}) as answer:
            yield answer, have if answer.status == 206 else 0


class _Empty:
    def read(self, count: int = -1) -> bytes:
        return b""


class _Fsspec(Source):
    def __init__(self, url: str) -> None:
        import fsspec

        try:
            self.system, self.path = fsspec.core.url_to_fs(url)
            told = self.system.info(self.path)
        except ImportError as e:
            raise ShardError([(without_secrets(url), f"its scheme needs a package: {e}")]) from None
        except OSError:
            raise
        except Exception as e:  # each system has errors of its own
            raise ConnectionError(f"{type(e).__name__}: {_told(e)}") from e
        self.size = told.get("size")
        names = ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "md5", "created")
        self.facts = {"size": self.size, **{name: str(told[name]) for name in names if told.get(name)}}

    @contextmanager
    def open(self, have: int) -> Iterator[tuple[BinaryIO, int]]:
        with self.system.open(self.path, "rb") as file:
            file.seek(have)
            yield file, have


@contextmanager
def _get(url: str, headers: Mapping[str, str] | None = None) -> Iterator[http.client.HTTPResponse]:
    parts = urlsplit(url)
    headers = {"User-Agent": "mmpre", "Accept-Encoding": "identity", **(headers or {})}
    if parts.username is not None:
        words = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(words.encode()).decode()
    bare = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, parts.query, ""))
    try:
        with urllib.request.urlopen(urllib.request.Request(bare, headers=headers), timeout=TIMEOUT_S) as answer:
            yield answer
    except urllib.error.HTTPError as e:
        told = f"the server answers {e.code} {e.reason}"
        if e.code in (401, 403):
            raise PermissionError(told) from None
        if e.code in _GONE:
            raise FileNotFoundError(told) from None
        raise ConnectionError(told) from None
    except urllib.error.URLError as e:
        raise ConnectionError(_told(e.reason)) from None


def _told(e: object) -> str:
    """An error's text without the queries of urls in it."""
    return re.sub(r"(\w+://)(?:[^/\s@]*@)?([^\s?#]*)[?#]\S*", r"\1\2", str(e))


def _name(url: str) -> str:
    """A file name for the copy: the url's own, made safe."""
    name = re.sub(r"[^\w.-]", "_", unquote(urlsplit(url).path).rsplit("/", 1)[-1]).lstrip(".")
    return name[-100:] or "shard.tar"
