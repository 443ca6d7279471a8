"""A fruit fly's chromosome arm, 21 million bases, 5 million of them with genes.

Debian package `augustus-doc`: Drosophila melanogaster, chr2R; bases in lower case are repeats. Its gene list names
"chr2R" but counts from base 2,000,000 of it; read so, every coding sequence can be translated, which is checked here.
"""

from collections.abc import Iterator
from pathlib import Path

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
tasks = tuple(
    EvalTask(kind="classification", about=about, input="fa", target="genes", train="probe", baseline=baseline)
    for about, baseline in (
        ("windows of 128 bases wholly coding or not at all, balanced", "base counts 82.5 %, 3-mer ridge 87.2 %"),
        ("windows of 256 bases wholly coding or not at all, balanced", "3-mer ridge 92.7 %, 4-mer ridge 94.8 %"),
        ("true splice donors among random GT, 40 bases", "one-hot ridge 90.5 %, area under the curve 0.973"),
        ("windows of 64 bases wholly coding or not at all, reading frame (3 ways), strand", None),
    )
)


def build(out: Path, *, source: Path | None = None, fetch: bool = False) -> Path:
    """Write pieces of 65,536 bases: `fa`, `genes` (a letter a base) and `json` with coordinates and transcripts.

    `train` and `valid` are the parts of the chromosome without labels, `probe` (4 million bases) and `test` (1 million)
    the labelled part.
    """
    with unpacked(*packages, source=source, fetch=fetch) as got, whole_folder(out) as aside:
        bases, genes = read(got[0].folder / FOLDER)
        checks = check(bases, genes)
        counts = write_splits(aside, _pieces(bases, genes), "augustus")
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


def _pieces(bases: str, genes: tuple[Gene, ...]) -> Iterator[tuple[str, Sample]]:
    about = {"species": "Drosophila melanogaster"}
    plain, labelled = Sequence("chr2R", bases, about), Sequence("chr2R", bases, about, genes)
    borders = [(0, LABELLED[0], "train"), (LABELLED[0], TEST, "probe"), (TEST, LABELLED[1], "test"),
               (LABELLED[1], VALID[0], "train"), (*VALID, "valid"), (VALID[1], len(bases), "train")]  # fmt: skip
    for start, end, split in borders:
        for _, sample in (labelled if split in ("probe", "test") else plain).pieces(start, end):
            yield split, sample
