"""Samples of a data set, each to the shards of its split."""

from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from mmpre.data.shards import ShardSink, shard_writer
from mmpre.data_tools.bar import bar

Sample = Mapping[str, str | bytes]
MAX_BYTES = 256 << 20  # of a shard's members


def write_splits(
    out: Path, samples: Iterable[tuple[str, Sample]], what: str, *, total: int | None = None
) -> dict[str, int]:
    """Write each sample to its place, and count the samples of each split.

    A place is a split, "train", whose shards are then `train/train-000000.tar` and so on, or a split and a part of it,
    "train/fr": `train/fr-000000.tar`, so that a pattern names that part alone.
    """
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        sinks: dict[str, ShardSink] = {}
        for place, sample in bar(samples, f"{what}: writing", total=total):
            split, _, part = place.partition("/")
            if place not in sinks:
                sinks[place] = stack.enter_context(shard_writer(out / split, prefix=part or split, maxsize=MAX_BYTES))
            sinks[place].write(sample)
            counts[split] += 1
    first = [split for split in ("train", "valid", "test") if split in counts]
    return {split: counts[split] for split in dict.fromkeys([*first, *sorted(counts)])}
