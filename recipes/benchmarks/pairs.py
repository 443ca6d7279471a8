"""Captions and region features with the lengths that UNITER's data has, generated: sizes matter here, contents do not.

Captions of 5 to 60 words (mean 12), 10 to 100 regions (mean 38), as adaptive bottom-up attention finds on photographs
with the authors' limits. Features of 2048 and soft labels of 1601 values are stored in half precision, as theirs are.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer, models, pre_tokenizers

from mmpre.data.shards import shard_writer
from mmpre.data.tokenizer import SPECIALS

VOCABULARY = 28_996
SHARDS = 4


def write_pairs(
    folder: Path, count: int, *, features: int = 2048, classes: int = 1601, seed: int = 0
) -> tuple[Path, Path]:
    """Write `count` pairs to a folder of shards; returns it and a tokenizer.json of 28,996 whole words."""
    rng = np.random.default_rng(seed)
    shards, tokenizer = folder / "pairs", folder / "words.json"
    with shard_writer(shards, prefix="pairs", maxcount=-(-count // SHARDS)) as sink:
        for i in range(count):
            words = rng.zipf(1.3, size=caption_words(rng)) % (VOCABULARY - len(SPECIALS))
            tensors = regions(rng, region_count(rng), features, classes)
            text = " ".join(f"w{word}" for word in words)
            sink.write({"__key__": f"pair{i:06d}", "txt": text, "regions.safetensors": save(tensors)})
    names = [*SPECIALS, *(f"w{i}" for i in range(VOCABULARY - len(SPECIALS)))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.add_special_tokens(SPECIALS)
    words.save(str(tokenizer))
    return shards, tokenizer


def caption_words(rng: np.random.Generator) -> int:
    return int(np.clip(np.round(rng.lognormal(2.42, 0.35)), 5, 60))


def region_count(rng: np.random.Generator) -> int:
    return int(np.clip(np.round(10 + rng.gamma(2.0, 14.5)), 10, 100))


def regions(rng: np.random.Generator, count: int, features: int, classes: int) -> dict[str, np.ndarray]:
    """Named tensors of a picture's regions, as `RegionReader` wants them."""
    low, size = (rng.uniform(0, 0.5, size=(count, 2)) for _ in range(2))
    soft = rng.gamma(0.02, size=(count, classes)) + 1e-6
    return {
        "features": rng.standard_normal((count, features), dtype=np.float32).clip(0, None).astype(np.float16),
        "boxes": np.concatenate([low, low + size, size, size.prod(1, keepdims=True)], 1).astype(np.float16),
        "soft": (soft / soft.sum(1, keepdims=True)).astype(np.float16),
    }
