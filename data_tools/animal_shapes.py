"""Silhouettes of animals, 28 x 28 pixels, ten classes of 1,000 each.

Package `animal-shape-mnist` (PyPI, MIT). Zebras keep their stripes, so a model may know them by texture alone.
284 pictures are exact copies of others, which one split holds together; near copies are many and stand in all splits.
"""

import gzip
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import UInt8

from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.labelled_pictures import BY_CONTENT, labelled
from mmpre.data_tools.packages import Pip, unpacked
from mmpre.data_tools.split import RULE
from mmpre.data_tools.writing import write_splits

description = "silhouettes of animals, 28 x 28 pixels: 10,000 in 10 classes"
licence = "MIT (animal-shape-mnist)"
size = "2.6 MB"
packages = (Pip("animal-shape-mnist", "0.39", "animal_shape_mnist"),)
tasks = (EvalTask(kind="classification", about="the animal, 10 ways, equally many each", input="png", target="cls"),)
FILE = "data/Animal Shape/animal_data_version_3.gz"
NAMES = "bear bird cat cow dog elephant giraffe horse sheep zebra".split()  # in the order of the file, 1,000 each
MAX_BYTES = 64 << 20


class NumpyAlone(pickle.Unpickler):
    """Unpickles arrays of numbers and refuses everything else, before it can run."""

    # the function that makes an array when it is unpickled, asked of an array: its module is private
    KNOWN: ClassVar = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}

    def find_class(self, module: str, name: str) -> Callable:
        if module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") or name not in self.KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; only arrays are read")
        return self.KNOWN[name]


def build(out: Path, *, source: Path | None = None, fetch: bool = False) -> Path:
    """Write the pictures: `png` (grey), `cls` and `txt` (the animal's name)."""
    with whole_folder(out) as aside, unpacked(*packages, source=source, fetch=fetch) as got:
        pictures_NHW = read(got[0].folder / FILE)
        labels = np.arange(len(pictures_NHW)) * len(NAMES) // len(pictures_NHW)
        counts = write_splits(aside, labelled(pictures_NHW, labels, NAMES), "animal_shapes", total=len(labels))
        write_card(aside, name="animal_shapes", licence=licence, sources=got, counts=counts, tasks=tasks, classes=NAMES,
                   split_rule=f"{BY_CONTENT}: {RULE}")  # fmt: skip
    return out


def read(path: Path) -> UInt8[np.ndarray, "N H W"]:
    """Raises ValueError for a file that holds anything but an array, and for another array."""
    with gzip.open(path) as file:
        content = file.read(MAX_BYTES)
    try:
        pictures = NumpyAlone(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError) as e:
        raise ValueError(f"animal_shapes: {path.name} is no pickled array ({e}); get the package anew") from None
    if getattr(pictures, "ndim", 0) != 3 or pictures.dtype != np.uint8 or len(pictures) % len(NAMES):
        shape = getattr(pictures, "shape", None)
        raise ValueError(f"animal_shapes: wanted bytes of shape [10 times as many as a class, h, w], got {shape}")
    return pictures
