"""Lines of the scoreboard about checkpoints."""

import random
import resource
import statistics
import time
from pathlib import Path

import torch
from cases import BROKEN, CASES
from harness import newest, step_of
from lines import Figure, line
from runs import start, train
from torch import nn

import mmpre
from mmpre.exchange.export import export
from mmpre.runs import checkpoint
from mmpre.runs.options import RunOptions


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


@line("S15")
def full_disk(folder: Path) -> Figure:
    """No file may grow past 50 kB any more while a run saves; then room is made again."""
    shards = BROKEN.make(folder / "shards")
    run, unbroken = folder / "run", train(folder / "unbroken", shards)
    with start(run, shards, "--save-every", 5, "--max-unsaved", 10, breaks="slow@*") as tree:
        assert tree.until(lambda: step_of(run) >= 7, seconds=120), tree.output
        before = resource.prlimit(tree.process.pid, resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        assert tree.until(lambda: "step 15 was not written" in tree.output.replace("\n", " "), seconds=60), tree.output
        good = checkpoint.latest(run / "checkpoints").step
        resource.prlimit(tree.process.pid, resource.RLIMIT_FSIZE, before)
        survived = tree.wait(seconds=60) == 0 and newest(run) == newest(unbroken)
    shown = f"{'yes' if good == 5 else 'no'} / {'yes' if survived else 'no'}"
    return Figure(shown, good == 5 and survived, {"checkpoint before": good, "survived, and ended alike": survived})


@line("S16")
def stall(folder: Path) -> Figure:
    """A save of 200 MB, from the call to its return: write, sync, digests, and reading back; median of five."""
    tensors = {"model": {f"w{i}": torch.rand(1_250_000) for i in range(40)}}
    taken = []
    for number in range(5):
        begun = time.perf_counter()
        checkpoint.save(folder, number, tensors, {})
        taken.append(time.perf_counter() - begun)
    middle = statistics.median(taken)
    return Figure(f"{middle:.2f} s", middle < 1.0, {"seconds": taken, "bytes": 200_000_000})


@line("S23")
def export_against_checkpoint(folder: Path) -> Figure:
    """A trained BERT, exported to each class that fits: tensors read back, and what the library computes."""
    case = CASES["bert"]
    options = RunOptions(workers=0, threads=1)
    run = mmpre.train("bert", out=folder / "run", options=options, **case.numbers, **case.make(folder / "shards"))
    checks = {to: export(run, folder / to, to=to).checks for to in ("bert", "sentences")}
    tensors = max(one.difference for some in checks.values() for one in some if one.what == "tensors")
    states = max(one.difference for some in checks.values() for one in some if one.what != "tensors")
    good = tensors == 0 and all(one.good for some in checks.values() for one in some)
    numbers = {to: [one.line() for one in some] for to, some in checks.items()}
    return Figure(f"{tensors:g} / {states:.1g} ({', '.join(checks)})", good, numbers)
