"""Runs of a few steps, for tests that look at what a run leaves."""

import io

import numpy as np
import torch
from parity_text import some_samples, word_tokenizer
from PIL import Image

import mmpre
from mmpre.data.shard_writer import shard_writer
from mmpre.runs.options import RunOptions

EVIL = "<script>alert(1)</script>"  # a key that a careless page would run
OPTIONS = RunOptions(workers=0, log_every=1, save_every=4, threads=1)


def picture(seed, side_px=32):
    rng = np.random.default_rng(seed)
    shown_HW3 = np.full((side_px, side_px, 3), rng.integers(60, 200, 3), dtype=np.uint8)
    shown_HW3[: side_px // 2] = rng.integers(60, 200, 3)
    file = io.BytesIO()
    Image.fromarray(shown_HW3).save(file, "PNG")
    return file.getvalue()


def pairs(folder, count=24):
    """Shards of captions, regions and pictures, one of them under the key EVIL, and a tokenizer."""
    for split, seed in (("train", 0), ("valid", 1)):
        with shard_writer(folder / split) as sink:
            for i, sample in enumerate(some_samples(count, seed=seed)):
                key = EVIL if i == 0 else f"{split}{i:03d}"
                sink.write({"__key__": key, **sample.members, "png": picture(i)})
    word_tokenizer().save(str(folder / "tokenizer.json"))
    return {"data": [str(folder / "train")], "valid": [str(folder / "valid")]}


def train(recipe, out, options=OPTIONS, **numbers):
    torch.manual_seed(0)
    return mmpre.train(recipe, out=out, options=options, **numbers)


def bert(folder, out, **numbers):
    small = dict(width=16, depth=2, heads=2, length=16, batch=4, micro_batches=1, steps=8, warmup=2, valid_every=4)
    return train("bert", out, tokenizer=str(folder / "tokenizer.json"), **small | numbers)


def mae(out, **numbers):
    small = dict(width=32, depth=2, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2, patch_px=8,
                 side_px=0, batch=4, micro_batches=1, steps=4, warmup=1, valid_every=2)  # fmt: skip
    return train("mae", out, **small | numbers)


def uniter(folder, out, **numbers):
    small = dict(width=32, depth=2, heads=2, length=16, positions=16, features=16, classes=7, batch=4, micro_batches=1,
                 steps=12, warmup=2, valid_every=6)  # fmt: skip
    return train("uniter", out, tokenizer=str(folder / "tokenizer.json"), **small | numbers)
