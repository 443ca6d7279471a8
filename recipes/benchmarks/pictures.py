"""Pictures to read, generated: their sizes and what it costs to decode them matter here, not what they show."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mmpre.data.shards import shard_writer

SHARDS = 2


def write_pictures(folder: Path, count: int, *, side_px: tuple[int, int], seed: int = 0) -> Path:
    """Write `count` JPEG pictures with sides between two lengths to a folder of shards, and return it."""
    rng = np.random.default_rng(seed)
    shards = folder / "pictures"
    with shard_writer(shards, maxcount=-(-count // SHARDS)) as sink:
        for i in range(count):
            width, height = rng.integers(side_px[0], side_px[1] + 1, 2).tolist()
            sink.write({"__key__": f"picture{i:06d}", "jpg": jpeg(rng, width, height)})
    return shards


def jpeg(rng: np.random.Generator, width: int, height: int) -> bytes:
    """Coarse spots with some grain, so that a file has about as many bytes for its size as a photograph's."""
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-12, 13, (height, width, 1))
    buffer = io.BytesIO()
    Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
