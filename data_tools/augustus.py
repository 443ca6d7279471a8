"""A fruit fly's chromosome arm, 21 million bases, 5 million of them with genes.

Debian package `augustus-doc`: Drosophila melanogaster, chr2R; bases in lower case are repeats. Its gene list names
"chr2R" but counts from base 2,000,000 of it; read so, every coding sequence can be translated, which is checked here.
"""

import hashlib
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import numpy as np

from mmpre.data_tools.archives import ArchiveError
from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.genomes import LEGEND, Gene, Sequence, read_fasta
from mmpre.data_tools.packages import Apt, unpacked
from mmpre.data_tools.writing import Sample, write_splits

description = "a fruit fly's chromosome arm (chr2R), 21.1 M bases, 5 M of them with 1,120 transcripts"
licence = "Artistic-1.0 (augustus-doc)"
size = "23.7 MB"
FOLDER = "usr/share/doc/augustus/tutorial"
FILES = ("data/chr2R.fa", "data/chr2R.2M-7M.fa", "results/scipio.gff")
packages = (Apt("augustus-doc", tuple(f"{FOLDER}/{name}" for name in FILES)),)
# the labelled part is not pretrained on; its last million bases are the test
LABELLED, TEST, VALID = (2_000_000, 7_000_000), 6_000_000, (19_000_000, 20_000_000)
WINDOWS = (64, 128)  # bases that are wholly coding or not at all
DONOR = 20  # bases to each side of where a coding part ends
PARTS = (("train", LABELLED[0], 5_500_000), ("valid", 5_500_000, TEST), ("test", TEST, LABELLED[1]))


def _task(what: str, about: str, baseline: str | None, **more: int) -> EvalTask:
    splits = {name: f"{what}-{split}" for name, split in (("train", "train"), ("valid", "valid"), ("split", "test"))}
    return EvalTask(kind="classification", about=about, input="fa", target="cls", baseline=baseline, **splits, **more)


tasks = (
    _task("coding-64", "64 bases wholly coding or not at all, balanced", None),
    _task("coding-128", "128 bases wholly coding or not at all, balanced", "base counts 82.5 %, 3-mer ridge 87.2 %"),
    _task("donor", "true splice donors among other GT, 40 bases, balanced", None),
    # a donor is a matter of places: 40 bases between two special tokens
    _task("donor", "true splice donors among other GT, 40 bases, by place", "one-hot ridge 90.5 %", period=42),
)


def build(out: Path, *, source: Path | None = None, fetch: bool = False) -> Path:
    """Write pieces of 65,536 bases: `fa`, `genes` (a letter a base) and `json` with coordinates and transcripts.

    `train` and `valid` are the parts of the chromosome without labels, `probe` (4 million bases) and `test` (1 million)
    the labelled part. Of that part come short windows with a class (`fa`, `cls`), for probes: `coding-64-train` and so
    on, `coding-128-*`, `donor-*`, as many of each class; valid is its bases 5.5 to 6 million.
    """
    with whole_folder(out) as aside, unpacked(*packages, source=source, fetch=fetch) as got:
        bases, genes = read(got[0].folder / FOLDER)
        checks = check(bases, genes)
        labelled = Sequence("chr2R", bases, {"species": "Drosophila melanogaster"}, genes)
        counts = write_splits(aside, chain(_pieces(labelled), windows(labelled)), "augustus")
        write_card(aside, name="augustus", licence=licence, sources=got, counts=counts, tasks=tasks, genes=LEGEND,
                   bases=len(bases), **checks, split_rule="by position on chr2R: probe 2 to 6 Mb, test 6 to 7 Mb, "
                   "valid 19 to 20 Mb, train the rest")  # fmt: skip
    return out


def read(folder: Path) -> tuple[str, tuple[Gene, ...]]:
    """The whole chromosome arm, and its transcripts in the arm's own coordinates."""
    ((_, bases),) = read_fasta(folder / "data/chr2R.fa")
    ((_, cut),) = read_fasta(folder / "data/chr2R.2M-7M.fa")
    offset = LABELLED[0]
    if bases[slice(*LABELLED)].upper() != cut.upper():
        raise ArchiveError(f"augustus: {folder}: chr2R.2M-7M.fa is not bases 2,000,000 to 7,000,000 of chr2R.fa")
    parts: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for line in (folder / "results/scipio.gff").read_text().splitlines():
        _, _, kind, start, end, _, strand, _, name = line.split("\t")
        if kind == "CDS":  # counted from 1, ends included
            parts.setdefault((name.split('"')[1], strand), []).append((offset + int(start) - 1, offset + int(end)))
    genes = [Gene(name, strand, tuple(sorted(some))) for (name, strand), some in parts.items()]
    return bases, tuple(sorted(genes, key=lambda gene: (gene.parts, gene.strand, gene.name)))


def check(bases: str, genes: tuple[Gene, ...]) -> dict[str, int]:
    """Counts that are only right if bases and genes fit. Raises ArchiveError where they do not."""
    coding = [gene.coding(bases) for gene in genes]
    through = sum(gene.is_read_through(bases) for gene in genes)
    if through < 0.99 * len(genes):
        raise ArchiveError(f"augustus: only {through} of {len(genes)} coding sequences can be translated; their "
                           "coordinates do not fit the chromosome")  # fmt: skip
    begins = sum(one.startswith("ATG") for one in coding)
    return {"transcripts": len(genes), "without_inner_stop": through, "beginning_with_ATG": begins}


def windows(labelled: Sequence) -> Iterator[tuple[str, Sample]]:
    """Short windows of the labelled part with their class: 1 where coding, or a true donor, 0 otherwise."""
    bases, track = labelled.bases.upper(), np.frombuffer(labelled.track.encode(), dtype=np.uint8)
    coding = np.isin(track, np.frombuffer(b"012abc", dtype=np.uint8))
    before = np.concatenate([[0], np.cumsum(coding)])
    donors = _donors(bases, labelled.genes)
    for split, start, end in PARTS:
        for size in WINDOWS:
            first = np.arange(start, end - size + 1, max(WINDOWS))
            share = before[first + size] - before[first]
            yield from _balanced(f"coding-{size}-{split}", bases, size, first[share == size], first[share == 0])
        mine = np.array(sorted(at for at in donors if start <= at - DONOR and at + DONOR <= end), dtype=np.int64)
        others = [at.start() for at in re.finditer("(?=GT)", bases[start + DONOR : end - DONOR])]
        others = np.setdiff1d(np.array(others, dtype=np.int64) + start + DONOR, mine)
        yield from _balanced(f"donor-{split}", bases, 2 * DONOR, mine - DONOR, others - DONOR)


def _donors(bases: str, genes: tuple[Gene, ...]) -> set[int]:
    """Where an intron begins with GT, on the strand as written."""
    ends = {end for gene in genes if gene.strand == "+" for _, end in gene.parts[:-1]}
    return {at for at in ends if bases[at : at + 2] == "GT"}


def _balanced(place: str, bases: str, size: int, yes: np.ndarray, no: np.ndarray) -> Iterator[tuple[str, Sample]]:
    """As many windows of each class, drawn from the place's name alone."""
    seed = int(hashlib.sha1(place.encode()).hexdigest()[:8], 16)
    rng, count = np.random.default_rng(seed), min(len(yes), len(no))
    chosen = [(int(at), label) for label, some in enumerate((no, yes)) for at in rng.permutation(some)[:count]]
    for at, label in sorted(chosen):
        window = f">chr2R:{at}-{at + size}\n{bases[at : at + size]}\n"
        yield place, {"__key__": f"{place}-{at:09d}", "fa": window, "cls": str(label)}


def _pieces(labelled: Sequence) -> Iterator[tuple[str, Sample]]:
    plain, size = Sequence("chr2R", labelled.bases, labelled.about), len(labelled.bases)
    borders = [(0, LABELLED[0], "train"), (LABELLED[0], TEST, "probe"), (TEST, LABELLED[1], "test"),
               (LABELLED[1], VALID[0], "train"), (*VALID, "valid"), (VALID[1], size, "train")]  # fmt: skip
    for start, end, split in borders:
        for _, sample in (labelled if split in ("probe", "test") else plain).pieces(start, end):
            yield split, sample
