"""Small grey pictures with a class each, as samples."""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mmpre.data_tools.split import split_of
from mmpre.data_tools.writing import Sample

BY_CONTENT = "by the picture's content (SHA-1 in hexadecimal), so equal pictures stand together"


def labelled(
    pictures: Iterable[UInt8[np.ndarray, "H W"]], labels: Iterable[int], names: Sequence[str]
) -> Iterator[tuple[str, Sample]]:
    """Each picture with its place: `png`, `cls` (the class's number) and `txt` (its name)."""
    for number, (picture_HW, label) in enumerate(zip(pictures, labels, strict=True)):
        file = io.BytesIO()
        Image.fromarray(picture_HW).save(file, "PNG")
        split = split_of(hashlib.sha1(picture_HW.tobytes()).hexdigest())
        yield split, {"__key__": f"{number:06d}", "png": file.getvalue(), "cls": str(label), "txt": names[label]}
