"""Genomes of 16 strains of four bacteria: E. coli, H. pylori, S. aureus and V. cholerae.

Debian package `ragout-examples`. The last strain of each species is the test.
"""

from collections.abc import Iterator
from pathlib import Path

from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.genomes import Sequence, read_fasta
from mmpre.data_tools.packages import Apt, unpacked
from mmpre.data_tools.split import RULE, split_of
from mmpre.data_tools.writing import Sample, write_splits

description = "genomes of 16 strains of 4 bacteria, 48 M bases"
licence = "BSD-3 (ragout-examples)"
size = "18.4 MB"
FOLDER = "usr/share/doc/ragout/examples"
SPECIES = {
    "E.Coli": "Escherichia coli", "H.Pylori": "Helicobacter pylori", "S.Aureus": "Staphylococcus aureus",
    "V.Cholerae": "Vibrio cholerae",
}  # fmt: skip
packages = (Apt("ragout-examples", tuple(f"{FOLDER}/{name}/references" for name in SPECIES)),)
tasks = (
    EvalTask(kind="classification", about="the species of 500 bases of a strain held out, 4 ways", input="fa",
             target="json:species", baseline="4-mer ridge 93.9 %"),
)  # fmt: skip


def build(out: Path, *, source: Path | None = None, fetch: bool = False) -> Path:
    """Write pieces of 65,536 bases: `fa` and `json` (species, strain, sequence, start, end)."""
    with whole_folder(out) as aside, unpacked(*packages, source=source, fetch=fetch) as got:
        strains = {name: sorted((got[0].folder / FOLDER / name / "references").glob("*.fasta*")) for name in SPECIES}
        counts = write_splits(aside, _pieces(strains), "ragout")
        listed = {SPECIES[name]: [path.name.split(".")[0] for path in paths] for name, paths in strains.items()}
        write_card(aside, name="ragout", licence=licence, sources=got, counts=counts, tasks=tasks, strains=listed,
                   split_rule=f"test: the last strain of each species; of the others, by piece: {RULE}, its test and "
                   "train both train")  # fmt: skip
    return out


def _pieces(strains: dict[str, list[Path]]) -> Iterator[tuple[str, Sample]]:
    for name, paths in strains.items():
        for path in paths:
            strain = path.name.split(".")[0]
            for number, (_, bases) in enumerate(read_fasta(path), 1):
                sequence = Sequence(f"{name}-{strain}-{number}", bases, {"species": SPECIES[name], "strain": strain})
                for start, sample in sequence.pieces(0, len(bases)):
                    if path == paths[-1]:
                        yield "test", sample
                    else:
                        yield "valid" if split_of(f"{sequence.name}-{start}") == "valid" else "train", sample
