"""From a tar's members to samples, by the naming rule of WebDataset.

A file's key is its path up to the first dot of its base name, its suffix is what follows that dot, in lower case:
`a/b.seg.PNG` is member `seg.png` of sample `a/b`. Members of one key make one sample, wherever they stand in the tar.
Left out, as WebDataset does: directories, names without a dot, and `__name__` at the top. Left out beside that: hidden
files (`a/.DS_Store`, which WebDataset takes for a member of `a/`), links, devices and sparse files, and names that
are absolute or hold `..`. Names that are not UTF-8 are kept, with escapes.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from mmpre.data.tar import Member, Walk, printable

_META = re.compile(rb"__[^/]*__($|/)")
_MANY_MEMBERS = 1000


@dataclass(slots=True)
class Grouped:
    """A sample: its members by suffix, in the tar's order. An incomplete one lost a member and is never read."""

    key: bytes
    members: dict[bytes, Member] = field(default_factory=dict)
    incomplete: str = ""


def group(walk: Walk) -> tuple[list[Grouped], list[str]]:
    """Samples in the order of their first members, and the file names that occur twice (escaped).

    Damage never joins members of two samples: where a member is missing, the samples around it that are not like the
    others are marked incomplete.
    """
    samples: dict[bytes, Grouped] = {}
    twice: list[str] = []
    at: list[Grouped | None] = []  # the sample of each member of the walk
    for member in walk.members:
        split = None if member.lost == "doubtful name" else _split(member.name, walk)
        if split is None:
            at.append(None)
            continue
        key, suffix = split
        sample = samples.get(key)
        if sample is None:
            sample = samples[key] = Grouped(key)
        at.append(sample)
        if suffix in sample.members:
            if walk.gaps:
                sample.incomplete = "a name occurs twice in a damaged shard"
            else:
                twice.append(printable(member.name))
            continue
        sample.members[suffix] = member
        if member.lost:
            sample.incomplete = f"{printable(suffix)}: {member.lost}"
        elif member.run != next(iter(sample.members.values())).run:
            sample.incomplete = "its members stand before and after damage"
    _mark_around_gaps(walk, samples, at)
    found = list(samples.values())
    for sample in found:
        if len(sample.members) > _MANY_MEMBERS:
            detail = f"{len(sample.members)} files; a key ends at the first dot of the file's name"
            walk.note("large sample", sample.key, detail)
    return found, twice


def _split(name: bytes, walk: Walk) -> tuple[bytes, bytes] | None:
    folder, slash, base = name.rpartition(b"/")
    stem, dot, suffix = base.partition(b".")
    if name.startswith(b"/") or b".." in folder.split(b"/"):
        walk.note("unsafe name", name, "is absolute or leaves its folder; write the shard with relative names")
    elif _META.match(name):
        return None
    elif not stem:
        walk.note("hidden file", name, "is left out")
    elif not dot:
        walk.note("no suffix", name, "has no dot in its base name and is left out")
    else:
        return folder + slash + stem, suffix.lower() if suffix.isascii() else _lower(suffix)
    return None


def _lower(suffix: bytes) -> bytes:
    return suffix.decode("utf-8", "surrogateescape").lower().encode("utf-8", "surrogateescape")


def _mark_around_gaps(walk: Walk, samples: dict[bytes, Grouped], at: list[Grouped | None]) -> None:
    """A lost member may have belonged to the sample before or after it, or been a sample of its own."""
    gaps = sorted(walk.gaps | {i for i, member in enumerate(walk.members) if member.lost == "doubtful name"})
    if not gaps:
        return
    near: list[Grouped] = []
    for gap in gaps:
        before = next((sample for sample in reversed(at[:gap]) if sample), None)
        after = next((sample for sample in at[gap:] if sample), None)
        if before is not None and before is after:
            before.incomplete = before.incomplete or "a member is missing between two others"
        near += [sample for sample in (before, after) if sample]
    if _interleaved(at):
        near = list(samples.values())
    usual = _usual(samples, near)
    for sample in near:
        if not sample.incomplete and (usual is None or not usual <= sample.members.keys()):
            sample.incomplete = "a member beside it is missing, and it does not have all that other samples have"


def _usual(samples: dict[bytes, Grouped], near: list[Grouped]) -> frozenset[bytes] | None:
    """The suffixes that samples far from damage mostly have; without such, those of the fullest sample if any has
    fewer, and None if all are alike: then nothing tells who lost a member."""
    beside = {id(sample) for sample in near}
    kinds = Counter(
        frozenset(sample.members) for sample in samples.values() if id(sample) not in beside and not sample.incomplete
    )
    if kinds:
        return kinds.most_common(1)[0][0]
    sets = {frozenset(sample.members) for sample in samples.values() if not sample.incomplete}
    return max(sets, key=lambda one: (len(one), sorted(one))) if len(sets) > 1 else None


def _interleaved(at: list[Grouped | None]) -> bool:
    order = [sample.key for sample in _runs(at)]
    return len(order) > len(set(order))


def _runs(at: list[Grouped | None]) -> Iterator[Grouped]:
    last = None
    for sample in at:
        if sample is not None and sample is not last and not sample.incomplete:
            yield sample
            last = sample
