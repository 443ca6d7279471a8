"""Handwritten digits of 8 x 8 pixels, the well-known 1,797 that come with scikit-learn."""

import gzip
from pathlib import Path

import numpy as np

from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.labelled_pictures import BY_CONTENT, labelled
from mmpre.data_tools.packages import Pip, unpacked
from mmpre.data_tools.split import RULE
from mmpre.data_tools.writing import write_splits

description = "handwritten digits of 8 x 8 pixels: 1,797 in 10 classes"
licence = "CC-BY-4.0 (Alpaydin and Kaynak, UCI; package: BSD-3)"
size = "9.3 MB"
packages = (Pip("scikit-learn", "1.9.1", "sklearn", ("sklearn/datasets/data/digits",)),)
tasks = (EvalTask(kind="classification", about="the digit, 10 ways", input="png", target="cls"),)
NAMES = "zero one two three four five six seven eight nine".split()
LEVELS = 16


def build(out: Path, *, source: Path | None = None, fetch: bool = False) -> Path:
    """Write the digits: `png` (grey), `cls` and `txt` (the digit's name)."""
    with whole_folder(out) as aside, unpacked(*packages, source=source, fetch=fetch) as got:
        with gzip.open(got[0].folder / "datasets" / "data" / "digits.csv.gz", "rt") as file:
            values = np.loadtxt(file, delimiter=",", dtype=np.int64)
        pictures = (values[:, :-1] * 255 // LEVELS).astype(np.uint8).reshape(-1, 8, 8)
        counts = write_splits(aside, labelled(pictures, values[:, -1], NAMES), "digits", total=len(pictures))
        write_card(aside, name="digits", licence=licence, sources=got, counts=counts, tasks=tasks, classes=NAMES,
                   split_rule=f"{BY_CONTENT}: {RULE}")  # fmt: skip
    return out
