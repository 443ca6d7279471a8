"""Lines of the scoreboard about checkpoints."""

import random
from pathlib import Path

import torch
from lines import Figure, does_not_apply, line
from torch import nn

from mmpre import checkpoint

does_not_apply("S23", "mmpre exports nothing yet")


@line("S14")
def flipped_bits(folder: Path) -> Figure:
    """Flip a bit at 100 random places of every file; a load must refuse it, whatever the bit says."""
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    tensors, meta = checkpoint.flatten_optimizer(optimizer, module)
    files = {"model": module.state_dict(), "optimizer": tensors}
    path = checkpoint.save(folder, 1, files, {"step": 1, "optimizer": meta})
    dice, tried, found = random.Random(0), 0, 0
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for _ in range(100):
            broken = bytearray(whole)
            broken[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
            file.write_bytes(broken)
            tried += 1
            try:
                checkpoint.load(path)
            except checkpoint.CheckpointError:
                found += 1
        file.write_bytes(whole)
    return Figure(f"{found / tried:.0%} ({found} of {tried})", found == tried, {"tried": tried, "found": found})
