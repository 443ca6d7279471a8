"""A sample of a WebDataset shard, and how its members become text, pictures, numbers and tensors.

Members are data that nobody vouches for: nothing is unpickled, sizes are looked at before anything is decoded, and a
member that cannot be read raises `BadMember`, which costs that sample alone.
"""

import io
import math
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import safetensors.torch
from PIL import Image, ImageOps
from torch import Tensor

from mmpre.strict_json import JSONError, parse

MAX_TEXT_BYTES = 4 << 20
MAX_ARRAY_BYTES = 256 << 20
MAX_PIXELS = 64 << 20
IMAGE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}


def picture_member(picture: Image.Image, suffixes: Sequence[str] = tuple(IMAGE_FORMATS)) -> dict[str, bytes]:
    """A picture as the member that `Sample.image` reads, of the first suffix."""
    data = io.BytesIO()
    picture.save(data, IMAGE_FORMATS[suffixes[0]])
    return {suffixes[0]: data.getvalue()}


class BadMember(ValueError):
    """A member that cannot be used. `cause` is a short, countable name for why, `sample` whose it is, where known."""

    sample: "Sample | None" = None

    def __init__(self, cause: str, member: str, detail: str) -> None:
        super().__init__(f"{member}: {detail}")
        self.cause, self.member, self.detail = cause, member, detail


@dataclass(frozen=True)
class Sample:
    """The members of one sample as bytes, by suffix; known by the digest of its shard and its key.

    `window` says which window of it a row is made of, `most` how many tokens the row may have (None: no bound), which
    readers that can shorten heed.
    """

    key: str
    shard: str
    digest: str
    members: Mapping[str, bytes]
    window: int = 0
    most: int | None = None

    def at_window(self, window: int) -> "Sample":
        return replace(self, window=window)

    def at_most(self, most: int | None) -> "Sample":
        return self if most == self.most else replace(self, most=most)

    def bytes(self, suffixes: Sequence[str]) -> tuple[str, bytes]:
        """The first member of the sample that has one of the suffixes, with its suffix."""
        for suffix in suffixes:
            if suffix in self.members:
                return suffix, self.members[suffix]
        have = ", ".join(sorted(self.members)) or "nothing"
        wanted = " or ".join(f".{suffix}" for suffix in suffixes)
        raise BadMember("missing member", "|".join(suffixes), f"wanted {wanted}, the sample has {have}")

    def text(self, suffixes: Sequence[str] = ("txt",)) -> str:
        """A member as text: UTF-8, not empty, at most 4 MiB, NUL taken out."""
        suffix, data = self.bytes(suffixes)
        if len(data) > MAX_TEXT_BYTES:
            detail = f"{len(data):,} bytes, at most {MAX_TEXT_BYTES:,} are read; cut it"
            raise BadMember("text too long", suffix, detail)
        try:
            text = data.decode("utf-8").replace("\0", "")
        except UnicodeDecodeError as e:
            raise BadMember("not UTF-8", suffix, f"byte {e.start} is not UTF-8; convert the file") from None
        if not text.strip():
            raise BadMember("empty text", suffix, "there is no text in it; leave the sample out")
        return text

    def json(self, suffixes: Sequence[str] = ("json",)) -> Any:
        suffix, data = self.bytes(suffixes)
        try:
            return parse(data, max_bytes=MAX_TEXT_BYTES)
        except JSONError as e:
            raise BadMember("bad JSON", suffix, str(e)) from None

    def image(self, suffixes: Sequence[str] = tuple(IMAGE_FORMATS)) -> Image.Image:
        """A member as an RGB picture, upright; transparency is laid on white, the first frame of an animation is taken.

        The kind of file must fit the suffix and its header must not announce more than 64 Mi pixels.
        """
        suffix, data = self.bytes(suffixes)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                picture = Image.open(io.BytesIO(data), formats=sorted(set(IMAGE_FORMATS.values())))
            if picture.format != IMAGE_FORMATS.get(suffix, picture.format):
                raise BadMember(
                    "wrong type", suffix,
                    f"its content is {picture.format}, not {IMAGE_FORMATS[suffix]}; give it the suffix that it is",
                )  # fmt: skip
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.width} x {picture.height} pixels"
                raise BadMember("picture too large", suffix, f"{size}, at most {MAX_PIXELS:,} are decoded; shrink it")
            picture.load()
            ImageOps.exif_transpose(picture, in_place=True)
        except (BadMember, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
            raise BadMember("picture too large", suffix, f"{str(e)[:200]}; shrink it") from None
        except Exception as e:  # foreign bytes can make a decoder raise anything
            raise BadMember("broken picture", suffix, f"cannot be decoded ({str(e)[:200]}); write it again") from None
        if picture.mode.startswith("I"):  # Pillow would cut, not scale, sixteen bits
            picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return picture if picture.mode == "RGB" else picture.convert("RGB")

    def array(self, suffixes: Sequence[str] = ("npy",)) -> np.ndarray:
        """A member as an array of numbers (.npy, little-endian), which may not claim more bytes than it has."""
        suffix, data = self.bytes(suffixes)
        return _array(data, suffix)

    def arrays(self, suffixes: Sequence[str] = ("npz",)) -> dict[str, np.ndarray]:
        """A member as named arrays (.npz); together at most 256 MiB, by what it says and by what comes."""
        suffix, data = self.bytes(suffixes)
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                files = {info.filename.removesuffix(".npy"): info for info in file.infolist()}
                claimed = sum(info.file_size for info in files.values())
                if claimed > MAX_ARRAY_BYTES:
                    detail = f"its arrays would take {claimed:,} bytes, at most {MAX_ARRAY_BYTES:,} are read; split it"
                    raise BadMember("array too large", suffix, detail)
                return {name: _array(_at_most(file, info), suffix) for name, info in files.items()}
        except (BadMember, MemoryError):
            raise
        except Exception as e:
            raise BadMember("broken array", suffix, f"is no .npz file ({str(e)[:200]}); write it again") from None

    def tensors(self, suffixes: Sequence[str]) -> dict[str, Tensor]:
        """A member as named tensors (safetensors)."""
        suffix, data = self.bytes(suffixes)
        try:
            return safetensors.torch.load(data)
        except Exception as e:  # the library's own error class is not public
            raise BadMember("broken tensors", suffix, f"not safetensors ({str(e)[:200]}); write it again") from None


def _array(data: bytes, suffix: str) -> np.ndarray:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns_first, kind = read(file)
    except Exception as e:
        raise BadMember("broken array", suffix, f"is no .npy file ({str(e)[:200]}); write it again") from None
    if kind.hasobject or kind.kind not in "biufc":
        raise BadMember(
            "array of objects",
            suffix,
            f"holds {kind}, wanted numbers; objects are pickles, which may run code: save numbers alone",
        )
    count, left = math.prod(shape), len(data) - file.tell()  # in Python's integers: a shape may claim any size
    if count * kind.itemsize != left:
        detail = f"shape {list(shape)} of {kind} does not fit its {left:,} bytes; write it again"
        raise BadMember("broken array", suffix, detail)
    array = np.frombuffer(data, kind, count, file.tell()).reshape(shape, order="F" if columns_first else "C")
    return array.astype(kind.newbyteorder("="))


def _at_most(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member of an archive, which may not hold more than it claims."""
    with file.open(info) as member:
        data = member.read(info.file_size + 1)
    if len(data) != info.file_size:
        raise ValueError(f"{info.filename} has another size than it claims")
    return data
