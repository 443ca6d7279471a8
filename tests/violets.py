"""VIOLET at a size for tests, and clips with captions and codes."""

import clips
import numpy as np
import safetensors.torch
import torch
from parity_text import some_batch

from mmpre.data.sample import Sample
from mmpre.draw import Draw
from mmpre.recipes.violet import violet

DRAW = Draw.micro_batch(0, 0, 0, 0)
SMALL = dict(
    channels=4, depths=(1, 1, 1, 1), swin_heads=(1, 1, 2, 2), window=(4, 2, 2), drop_path=0.0, depth=2, heads=2,
    side_px=64, codes=12, batch=8, micro_batches=1, steps=10, length=12, positions=12, dropout=0.0, places=5, lr=2e-3,
)  # fmt: skip
GRID = 4  # patches of a frame of 64 pixels


def member(key, count=6, words="w1 w2 w3 w4 w5", codes=None, frames=4, grid=GRID, side_px=64, **changed):
    """A clip of `count` frames of noise, a caption, and a code for each patch of `frames` frames."""
    rng = np.random.default_rng(int(key))
    clip = changed.get("clip", rng.integers(0, 255, (count, side_px, side_px, 3), dtype=np.uint8))
    taken = min(count, frames)
    codes = [-1, *(int(c) for c in rng.integers(0, 12, taken * grid))] if codes is None else codes
    told = {"codes": torch.tensor(codes, dtype=torch.int32), "lengths": torch.tensor([len(codes)])}
    members = {
        "webp": clips.animation(clip),
        "txt": words.encode(),
        "derived.safetensors": safetensors.torch.save(told),
    }
    return Sample(f"{key}", "shard", "digest", members)


def some(count=6):
    """Clips of 1 to 6 frames, with captions of 2 to 7 words."""
    return [member(i, 1 + i % 6, " ".join(f"w{(3 * i + j) % 60}" for j in range(2 + i % 6))) for i in range(count)]


def made(tokenizer, seed=0, **numbers):
    torch.manual_seed(seed)
    return violet(tokenizer=tokenizer, **SMALL | numbers)


def task_of(recipe):
    return recipe.stages[0].tasks[0]


def batch_of(recipe, samples, **more):
    task = task_of(recipe)
    return some_batch(task.view, task.objective.readers, samples, **more)
