"""Sequences of DNA as samples: pieces of chromosomes with their coordinates, and what is known of each base.

Coordinates count from 0 and ends are excluded, as Python's; they are those of the whole sequence, not of the piece.
"""

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mmpre.data_tools.writing import Sample

PIECE = 65_536  # bases of a sample at most; a reader cuts its own windows
COMPLEMENT = str.maketrans("acgtACGT", "tgcaTGCA")
STOPS = ("TAA", "TAG", "TGA")
LEGEND = (
    "genes, a letter a base: . outside of genes, i intron; coding: 0 1 2 the base's place in its codon on the strand "
    "as written, a b c on the other"
)


@dataclass(frozen=True)
class Gene:
    """A transcript's coding parts, in the order of the sequence."""

    name: str
    strand: str
    parts: tuple[tuple[int, int], ...]

    def coding(self, sequence: str) -> str:
        """The bases that are translated, in reading order, upper case."""
        joined = "".join(sequence[start:end] for start, end in self.parts).upper()
        return joined if self.strand == "+" else joined.translate(COMPLEMENT)[::-1]

    def is_read_through(self, sequence: str) -> bool:
        """Whether it can be translated: whole codons, and no stop before the last one."""
        coding = self.coding(sequence)
        return len(coding) % 3 == 0 and not any(coding[i : i + 3] in STOPS for i in range(0, len(coding) - 3, 3))


@dataclass(frozen=True)
class Sequence:
    """A chromosome or another long stretch; `genes` is None where they are not known."""

    name: str
    bases: str
    about: dict[str, str]
    genes: tuple[Gene, ...] | None = None
    track: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.genes is not None:
            object.__setattr__(self, "track", _track(len(self.bases), self.genes))

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, Sample]]:
        """Pieces of [start, end), each with its start: `fa`, `json`, and `genes` where genes are known."""
        for first in range(start, end, PIECE):
            last = min(first + PIECE, end)
            about = {"sequence": self.name, "start": first, "end": last, **self.about}
            members: dict[str, str | bytes] = {"fa": f">{self.name}:{first}-{last}\n{self.bases[first:last]}\n"}
            if self.genes is not None:
                members["genes"] = self.track[first:last]
                about["transcripts"] = [
                    {"name": gene.name, "strand": gene.strand, "coding": gene.parts}
                    for gene in self.genes
                    if gene.parts[0][0] < last and gene.parts[-1][1] > first
                ]
            key = f"{self.name}-{first:09d}".replace(".", "_")
            yield first, {"__key__": key, **members, "json": json.dumps(about)}


def read_fasta(path: Path) -> Iterator[tuple[str, str]]:
    """The header (without ">") and the bases of each sequence of a FASTA file, gzipped or not."""
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="ascii")
    header, lines = "", []
    with opened as file:
        for line in file:
            if line.startswith(">"):
                if lines:
                    yield header, "".join(lines)
                header, lines = line[1:].strip(), []
            else:
                lines.append(line.strip())
    if lines:
        yield header, "".join(lines)


def _track(length: int, genes: Iterable[Gene]) -> str:
    """One letter a base (LEGEND). Where transcripts overlap, coding goes before intron and the first one before others.

    A transcript's first base is taken for the first of a codon.
    """
    track = bytearray(b"." * length)
    for gene in genes:
        order = gene.parts if gene.strand == "+" else gene.parts[::-1]
        done = 0
        for start, end in order:
            letters = bytes((b"012" if gene.strand == "+" else b"abc")[(done + i) % 3] for i in range(end - start))
            letters = letters if gene.strand == "+" else letters[::-1]
            for place, letter in enumerate(letters, start):
                if track[place] in b".i":
                    track[place] = letter
            done += end - start
        for (_, start), (end, _) in zip(gene.parts, gene.parts[1:], strict=False):
            track[start:end] = track[start:end].replace(b".", b"i")
    return track.decode()
