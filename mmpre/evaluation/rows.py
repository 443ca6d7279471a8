"""Held-out rows that evaluations of recipes look at; what cannot be read is passed over, as it is in training."""

from collections.abc import Iterator, Mapping

from mmpre.batch import Row
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import CorruptSample
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.modality import Reader
from mmpre.view import View


def made_rows(view: View, readers: Mapping[str, Reader], units: Units, most: int) -> Iterator[tuple[Row, Draw]]:
    """Rows of the first `most` units that can be read, alike for every network and seed."""
    for i in range(min(most, len(units))):
        draw = Draw.row(0, 0, 0, epoch=0, unit=i)
        try:
            yield view.row(units.sample(i), readers, draw, lambda role, k: None), draw
        except (BadMember, CorruptSample):
            continue


def readable(units: Units, most: int, readers: Mapping[str, Reader]) -> list[Sample]:
    """Those of the first `most` units that all readers can read."""
    found, draw = [], Draw.row(0, 0, 0, epoch=0, unit=0)
    for i in range(min(most, len(units))):
        try:
            sample = units.sample(i)
            for reader in readers.values():
                reader.tokenize(sample, draw)
        except (BadMember, CorruptSample):
            continue
        found.append(sample)
    return found
