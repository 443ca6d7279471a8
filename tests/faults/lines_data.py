"""Lines of the scoreboard about shards: damage, checksums, the index; and the same damage on webdataset's reader."""

import io
import logging
import random
import signal
import time
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from lines import Figure, line
from PIL import Image
from tars import content, entries, flip, headers, tar

from mmpre.data.index import ShardError, open_shards
from mmpre.data.sample import Sample
from mmpre.data.shards import CorruptSample, ShardReader, shard_writer

FAULTS = 200
LIMIT_SECONDS = 3.0  # for reading two shards of 30 kB
SAMPLES = 8
SUFFIXES = ("jpg", "json", "txt")
Found = dict[tuple[str, str], dict[str, bytes]]  # by shard and key


class TooLongError(BaseException):
    """Not an Exception, which a reader's handler may pass over."""


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """Call, or raise TooLongError; the alarm that was set before goes on."""

    def ring(number: int, frame: object) -> None:
        raise TooLongError

    handler, begun = signal.signal(signal.SIGALRM, ring), time.monotonic()
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(0.1, left - (time.monotonic() - begun)))


def made(shard: str) -> dict[str, dict[str, bytes]]:
    """Samples whose bytes say whose they are; both shards use the same keys."""
    return {f"{i:06d}": {s: content(f"{shard}/{i:06d}", s, 600) for s in SUFFIXES} for i in range(SAMPLES)}


OWNER = {data: (shard, key) for shard in ("a", "b") for key, one in made(shard).items() for data in one.values()}


def _members(whole: bytes) -> Iterator[tuple[int, int, int]]:
    """(sample, place of the header, size) of every member."""
    for number, (place, _, size) in enumerate(headers(whole)):
        yield number // len(SUFFIXES), place, size


def damage(kind: str, whole: bytes, dice: random.Random) -> tuple[bytes, set[int]]:
    """A damaged shard, and the numbers of the samples that it touches."""
    sample, place, size = dice.choice(list(_members(whole)))
    later = set(range(sample, SAMPLES))
    match kind:
        case "A1 cut in a member":
            return whole[: place + 512 + dice.randrange(1, size)], later
        case "A2 cut between members":
            return whole[:place], later | _alone(sample)
        case "A3 cut in a header":
            return whole[: place + dice.randrange(1, 512)], later | _alone(sample)
        case "A4 bit in a header":
            return flip(whole, place + dice.randrange(512), dice.randrange(8)), {sample}
        case "A5 bit in a member":
            return flip(whole, place + 512 + dice.randrange(size), dice.randrange(8)), {sample}
        case "A6 empty":
            return b"", set(range(SAMPLES))
        case "A7 web page":
            return b"<!DOCTYPE html><html>" + b"moved " * 4000, set(range(SAMPLES))
        case "A13 replaced":
            other = {key: {s: bytes(reversed(d)) for s, d in one.items()} for key, one in made("a").items()}
            return tar(entries(other)), set(range(SAMPLES))
        case "A23 absurd size":
            field = dice.choice([b"\x80" + bytes(3) + b"\x10" + bytes(7), b"\xff" * 12])
            head = bytearray(whole[place : place + 512])
            head[124:136] = field
            head[148:156] = b" " * 8
            head[148:156] = b"%06o\0 " % sum(head)
            return whole[:place] + bytes(head) + whole[place + 512 :], {sample}
    raise ValueError(kind)


def _alone(cut: int) -> set[int]:
    """The first sample where it is all that is left: nothing in a tar tells whether it had more members."""
    return {0} if cut == 1 else set()


KINDS = ("A1 cut in a member", "A2 cut between members", "A3 cut in a header", "A4 bit in a header",
         "A5 bit in a member", "A6 empty", "A7 web page", "A13 replaced", "A23 absurd size")  # fmt: skip
NEEDS_INDEX = ("A5 bit in a member", "A13 replaced")


def by_mmpre(paths: list[Path], before: str | None) -> tuple[Found, bool]:
    """What mmpre reads of some shards, and whether it noticed anything. A refused shard is left out, as told to.

    `before` is the data's fingerprint when a run began on it: with another one the run is not resumed.
    """
    logging.getLogger("mmpre").setLevel(logging.ERROR)
    found, noticed = {}, False
    for path in paths:
        try:
            shards = open_shards(path)
        except ShardError:
            noticed = True
            continue
        noticed |= bool(shards.problems())
        if path == paths[0] and before is not None:
            noticed |= shards.fingerprint != before
        reader = ShardReader(shards)
        for i in range(len(shards)):
            try:
                found[path.stem, shards.key(i)] = reader.read(i)
            except CorruptSample:
                noticed = True
        reader.close()
    return found, noticed


def by_webdataset(paths: list[Path], before: str | None) -> tuple[Found, bool]:
    """What webdataset's reader delivers with a handler that goes on, and whether the handler was told of anything."""
    import webdataset

    told: list[Exception] = []

    def go_on(error: Exception) -> bool:
        told.append(error)
        return True

    found: Found = {}
    source = webdataset.WebDataset([str(path) for path in paths], shardshuffle=False, handler=go_on, empty_check=False)
    for sample in source:
        members = {name: data for name, data in sample.items() if name[0] != "_"}
        owner = next((OWNER[data][0] for data in members.values() if data in OWNER), f"?{len(found)}")
        found[owner if (owner, sample["__key__"]) not in found else f"{owner}+", sample["__key__"]] = members
    return found, bool(told)


def take(
    folder: Path, read: Callable[[list[Path], str | None], tuple[Found, bool]], *, indexed: bool
) -> dict[str, int]:
    """Damage shards in every way; count what was not noticed, falsely joined, and lost though healthy."""
    counts = {"faults": 0, "unnoticed": 0, "false pairs": 0, "healthy": 0, "healthy lost": 0, "hangs": 0}
    whole = {name: tar(entries(made(name))) for name in ("a", "b")}
    kinds: dict[str, list[int]] = {}
    for seed in range(FAULTS):
        dice = random.Random(seed)
        kind = KINDS[seed % len(KINDS)]
        paths = [folder / f"{name}.tar" for name in ("a", "b")]
        for path in paths:
            path.with_name(f"{path.name}.idx").unlink(missing_ok=True)
            path.write_bytes(whole[path.stem])
        # a tar holds no checksum of a member's bytes: what was flipped or replaced before the index, nothing can tell
        after = indexed and (seed // len(KINDS) % 2 == 1 or kind in NEEDS_INDEX)
        # the damage comes before or after the index was made
        before = open_shards(paths[0]).fingerprint if after else None
        broken, touched = damage(kind, whole["a"], dice)
        paths[0].write_bytes(broken)
        counts["faults"] += 1
        row = kinds.setdefault(kind, [0, 0, 0, 0, 0])
        row[0] += 1
        try:
            found, noticed = within(LIMIT_SECONDS, lambda paths=paths, before=before: read(paths, before))
        except TooLongError:  # a reader that never comes back has told nothing, but nobody trains on it either
            counts["hangs"] += 1
            row[4] += 1
            continue
        healthy = {("a", f"{i:06d}") for i in range(SAMPLES) if i not in touched}
        healthy |= {("b", f"{i:06d}") for i in range(SAMPLES)}
        true = {("a", key): one for key, one in made("a").items()} | {("b", key): one for key, one in made("b").items()}
        lost = sum(found.get(place) != true[place] for place in healthy)
        joined = sum(_false(members) for members in found.values())
        intact = all(found.get(place) == one for place, one in true.items())
        counts["unnoticed"] += not (noticed or intact or (kind in NEEDS_INDEX and not after))
        counts["false pairs"] += joined
        counts["healthy"] += len(healthy)
        counts["healthy lost"] += lost
        for i, value in enumerate((not (noticed or intact), joined, lost), start=1):
            row[i] += value
    return counts | {"by kind: faults, unnoticed, false pairs, healthy lost, hangs": kinds}


def _false(members: dict[str, bytes]) -> bool:
    """Whether whole members of two samples stand in one."""
    return len({OWNER[data] for data in members.values() if data in OWNER}) > 1


def _shown(counts: dict[str, int]) -> str:
    share = 1 - (counts["unnoticed"] + counts["hangs"]) / counts["faults"]
    return (
        f"{share:.1%} of {counts['faults']} / {counts['false pairs']} / {counts['healthy lost']} of {counts['healthy']}"
    )


@line("S6")
def damaged_shards(folder: Path) -> Figure:
    counts = take(folder, by_mmpre, indexed=True)
    good = not any(counts[name] for name in ("unnoticed", "false pairs", "healthy lost", "hangs"))
    return Figure(_shown(counts), good, counts)


@line("V1")
def damaged_shards_by_webdataset(folder: Path) -> Figure:
    """Flipped bytes of a member and a replaced shard cannot be told without an index, so that is not asked of it."""
    counts = take(folder, by_webdataset, indexed=False)
    hangs = f"{counts['hangs']} without end within {LIMIT_SECONDS:g} s"
    return Figure(
        f"{_shown(counts)}, {hangs}, webdataset {version('webdataset')}, a handler that goes on", True, counts
    )


@line("S17")
def share_of_checksums(folder: Path) -> Figure:
    """Time of the CRC-32 within reading and decoding pictures of 256 pixels a side."""
    rng = np.random.default_rng(0)
    with shard_writer(folder, prefix="a", maxcount=1000) as sink:
        for i in range(300):
            small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            small.resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
            sink.write({"__key__": f"k{i}", "jpg": buffer.getvalue(), "txt": b"a caption"})
    shards = open_shards([str(path) for path in sink.paths])
    reader, whole, sums = ShardReader(shards), [], []
    for _ in range(3):
        begun = time.perf_counter()
        for i in range(len(shards)):
            Sample("k", "a", "d", reader.read(i)).image()
        whole.append(time.perf_counter() - begun)
        members = [reader.read(i) for i in range(len(shards))]
        begun = time.perf_counter()
        for one in members:
            for data in one.values():
                zlib.crc32(data)
        sums.append(time.perf_counter() - begun)
    share = min(sums) / min(whole)
    return Figure(f"{share:.2%}", share < 0.03, {"crc_seconds": min(sums), "all_seconds": min(whole)})


@line("S21")
def index_rate(folder: Path) -> Figure:
    """10,000 members of 11 kB: how fast they are indexed, how large the index is."""
    path = folder / "a.tar"
    rng = np.random.default_rng(0)
    data = rng.bytes(11_000)
    path.write_bytes(tar(entries({f"{i:06d}": {"jpg": data, "txt": b"a caption"} for i in range(5000)})))
    open(path, "rb").read()
    begun = time.perf_counter()
    shards = open_shards(path)
    seconds = time.perf_counter() - begun
    rate, size = 10_000 / seconds, shards.indexes[0].where.stat().st_size / 10_000
    numbers = {"seconds": seconds, "bytes_a_member": size, "shard_bytes": path.stat().st_size}
    return Figure(f"{rate:,.0f} / {size:.1f}", rate > 15_000 and size < 64, numbers)
