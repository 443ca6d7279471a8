"""Sounds for tests, and their files."""

import io

import numpy as np
import soundfile

from mmpre.data.sample import Sample


def sound(seconds=1.0, rate_hz=16_000, seed=0):
    """A rising tone with noise, at most 0.6 loud."""
    t = np.arange(round(seconds * rate_hz)) / rate_hz
    rng = np.random.default_rng(seed)
    tone = 0.4 * np.sin(2 * np.pi * (200 + 100 * seed + 300 * t) * t)
    return (tone + rng.uniform(-0.2, 0.2, len(t))).astype(np.float32)


def encoded(wave, rate_hz=16_000, kind="wav", subtype=None):
    """The bytes of a file; `kind` is its suffix. WAVs hold floats, so that what is read is what was written."""
    file = io.BytesIO()
    subtype = subtype or {"wav": "FLOAT"}.get(kind)
    soundfile.write(file, wave, rate_hz, format=kind.upper(), subtype=subtype)
    return file.getvalue()


def sample(data, kind="wav", window=0, key="a"):
    """A sample with one sound: the bytes of a file, or samples."""
    data = data if isinstance(data, bytes) else encoded(data, kind=kind)
    return Sample(key, "shard", "digest", {kind: data}, window)
