"""Small video files made for tests: a square that moves over a ground that changes its colour."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

from mmpre.data.sample import Sample

CODECS = {"mp4": ("mp4", "libx264"), "mkv": ("matroska", "libx264"), "avi": ("avi", "mpeg4"),
          "webm": ("webm", "libvpx-vp9")}  # fmt: skip


def frames(count: int, height_px: int = 48, width_px: int = 64, seed: int = 0) -> np.ndarray:
    """[T, H, W, 3]; the red of the ground rises with time, so a frame tells its number: `number` reads it."""
    rng = np.random.default_rng(seed)
    clip = np.zeros((count, height_px, width_px, 3), np.uint8)
    clip[..., 0] = np.linspace(8, 248, count)[:, None, None]
    clip[..., 1] = rng.integers(40, 200)
    for t in range(count):
        x = t * (width_px - 12) // max(1, count - 1)
        clip[t, height_px // 3 : height_px // 3 + 12, x : x + 12, 1:] = 255, 20
    return clip


def number(frame_HW3: np.ndarray, count: int) -> int:
    return round((float(np.mean(frame_HW3[-6:, :, 0])) - 8) / 240 * (count - 1))


def animation(clip_THW3: np.ndarray, kind: str = "webp", ms: int | list[int] = 100, **options: object) -> bytes:
    pictures, file = [Image.fromarray(frame) for frame in clip_THW3], io.BytesIO()
    options = {"lossless": True} | options if kind == "webp" else options
    pictures[0].save(file, kind, save_all=True, append_images=pictures[1:], duration=ms, loop=0, **options)
    return file.getvalue()


def film(clip_THW3: np.ndarray, suffix: str = "mp4", *, folder: Path | None = None, rate: int = 10, gop: int = 12,
         codec: str = "", coding: dict[str, str] | None = None, **options: str) -> bytes:  # fmt: skip
    """A video file by PyAV; some options of the container want a `folder` to write in, `coding` are the codec's."""
    import av

    form, usual = CODECS[suffix]
    target = folder / f"film.{suffix}" if folder else io.BytesIO()
    with av.open(str(target) if folder else target, "w", format=form, options=options) as container:
        stream = container.add_stream(codec or usual, rate=rate, options=coding or {})
        stream.height, stream.width = clip_THW3.shape[1:3]
        stream.pix_fmt, stream.gop_size, stream.bit_rate = "yuv420p", gop, 2_000_000
        stream.codec_context.thread_count = 1
        for frame_HW3 in clip_THW3:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HW3, "rgb24")))
        container.mux(stream.encode())
    return target.read_bytes() if folder else target.getvalue()


def sample(data: bytes, suffix: str, key: str = "a") -> Sample:
    return Sample(key, "shard", "digest", {suffix: data})
