"""A sample of a WebDataset shard, and how its members become text, pictures, numbers and tensors.

Members are data that nobody vouches for: nothing is unpickled, sizes are looked at before anything is decoded, and a
member that cannot be read raises `BadMember`, which costs that sample alone.
"""

import io
import struct
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import safetensors.torch
from PIL import Image, ImageOps
from torch import Tensor

from mmpre.strict_json import JSONError, parse

MAX_TEXT_BYTES = 4 << 20
MAX_PIXELS = 64 << 20
IMAGE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "gif": "GIF", "bmp": "BMP"}


class BadMember(ValueError):
    """A member that cannot be used. `cause` is a short, countable name for why."""

    def __init__(self, cause: str, member: str, detail: str) -> None:
        super().__init__(f"{member}: {detail}")
        self.cause, self.member, self.detail = cause, member, detail


@dataclass(frozen=True)
class Sample:
    """The members of one sample as bytes, by suffix; known by the digest of its shard and its key."""

    key: str
    shard: str
    digest: str
    members: Mapping[str, bytes]
    window: int = 0

    def at_window(self, window: int) -> "Sample":
        return replace(self, window=window)

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
            raise BadMember("text too long", suffix, f"{len(data):,} bytes, at most {MAX_TEXT_BYTES:,} are read")
        try:
            text = data.decode("utf-8").replace("\0", "")
        except UnicodeDecodeError as e:
            raise BadMember("not UTF-8", suffix, f"byte {e.start} is not UTF-8; convert the file") from None
        if not text.strip():
            raise BadMember("empty text", suffix, "there is no text in it")
        return text

    def json(self, suffixes: Sequence[str] = ("json",)) -> Any:
        suffix, data = self.bytes(suffixes)
        try:
            return parse(data)
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
                raise BadMember("wrong type", suffix, f"its content is {picture.format}, not {IMAGE_FORMATS[suffix]}")
            if picture.width * picture.height > MAX_PIXELS:
                size = f"{picture.width} x {picture.height}"
                raise BadMember("picture too large", suffix, f"{size} pixels, at most {MAX_PIXELS:,} are decoded")
            ImageOps.exif_transpose(picture, in_place=True)
            if picture.mode.startswith("I;16"):  # Pillow would cut, not scale, sixteen bits
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            picture.load()
            return picture if picture.mode == "RGB" else picture.convert("RGB")
        except BadMember:
            raise
        except (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError) as e:
            raise BadMember("broken picture", suffix, f"cannot be decoded ({str(e)[:200]})") from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
            raise BadMember("picture too large", suffix, str(e)[:200]) from None

    def tensors(self, suffixes: Sequence[str]) -> dict[str, Tensor]:
        """A member as named tensors (safetensors)."""
        suffix, data = self.bytes(suffixes)
        try:
            return safetensors.torch.load(data)
        except Exception as e:  # the library's own error class is not public
            raise BadMember("broken tensors", suffix, f"not safetensors ({str(e)[:200]})") from None
