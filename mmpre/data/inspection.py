"""What is in some shards: `mmpre data inspect`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmpre.data.index import open_shards
from mmpre.data.shards import CorruptSample, ShardReader
from mmpre.data.tar import printable

TEXTS = {"txt", "json", "caption", "cls", "csv"}
SHOWN = 160  # characters of a text


def inspect_shards(urls: Sequence[str], samples: int = 3) -> dict[str, Any]:
    """Counts and sizes by suffix over all samples (from the index alone), and the first samples."""
    shards = open_shards(urls)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for index in shards.indexes:
        for local in range(len(index)):
            for member in index.members(local):
                counts[member.suffix] += 1
                sizes[member.suffix] += member.size
    reader, first = ShardReader(shards), []
    for i in range(min(samples, len(shards))):
        try:
            members = {suffix: _told(suffix, data) for suffix, data in reader.read(i).items()}
        except CorruptSample as e:
            members = {e.member or "sample": f"broken: {e.cause}"}
        first.append({"key": shards.key(i), "members": members})
    members = {s: {"count": counts[s], "bytes": sizes[s], "missing": len(shards) - counts[s]} for s in sorted(counts)}
    return {
        "shards": len(shards.indexes), "samples": len(shards), "fingerprint": shards.fingerprint,
        "members": members, "problems": shards.problems(), "first": first,
    }  # fmt: skip


def show(told: Mapping[str, Any], console: Console | None = None) -> None:
    """The same as a table."""
    console = console or Console()
    console.print(f"{told['samples']:,} samples in {told['shards']} shards, fingerprint {told['fingerprint'][:16]}")
    table = Table(box=None, padding=(0, 2))
    for column in ("member", "samples", "without it", "mean size"):
        table.add_column(column, justify="left" if column == "member" else "right")
    for suffix, one in told["members"].items():
        size = f"{one['bytes'] / one['count']:,.0f} bytes"
        table.add_row(Text(f".{printable(suffix)}"), f"{one['count']:,}", f"{one['missing']:,}", size)
    console.print(table)
    for shard, causes in told["problems"].items():
        lost = ", ".join(f"{cause} {n}" for cause, n in causes.items())
        console.print(f"{printable(shard)}: {lost}", style="yellow", markup=False, highlight=False)
    for sample in told["first"]:
        console.print(f"\n{printable(sample['key'])}", style="bold", markup=False, highlight=False)
        for suffix, text in sample["members"].items():
            console.print(f"  .{printable(suffix)}  {text}", markup=False, highlight=False)


def _told(suffix: str, data: bytes) -> str:
    if suffix in TEXTS or suffix.endswith("txt"):
        text = printable(data[: 4 * SHOWN].decode("utf-8", "replace"))
        return text[:SHOWN] + ("..." if len(text) > SHOWN else "")
    return f"{len(data):,} bytes"
