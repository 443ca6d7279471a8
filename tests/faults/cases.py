"""The runs that are broken: recipes at sizes of seconds, and their data, made here."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from parity_text import some_samples

from mmpre.data.index import open_shards
from mmpre.data.shards import shard_writer

HERE = Path(__file__).parent
STEPS = 36
_EVERY = {"steps": STEPS, "batch": 16, "micro_batches": 4, "lr": 1e-3}
_SMALL = _EVERY | {"width": 32, "depth": 2, "heads": 2, "warmup": 5, "dropout": 0.1, "valid_every": 12}


@dataclass(frozen=True)
class Case:
    """A recipe, its numbers, and how its shards are made."""

    name: str
    recipe: str
    numbers: dict[str, object]
    count: int = 120  # samples to train on

    def make(self, folder: Path) -> dict[str, tuple[str, ...]]:
        """Write training and held-out shards, then damage one sample of the first shard; returns `data` and `valid`."""
        made = {"data": _write(folder, "train", self.count, self), "valid": _write(folder, "valid", 24, self)}
        flip_payload(Path(made["data"][0]), sample=7)
        return made

    def samples(self, count: int, seed: int) -> list[dict[str, bytes]]:
        return _melodies(count, seed) if self.recipe.endswith(".py") else _captions(count, seed)


def _of(name: str, recipe: str, **numbers: object) -> tuple[str, Case]:
    return name, Case(name, recipe, numbers)


CASES = dict(
    [
        _of("bert", "bert", **_SMALL, length=14),
        _of("electra", "electra", **_SMALL, length=14, positions=14, table=16, generator_width=16, generator_heads=2),
        _of(
            "mirror_bert", "mirror_bert", **_EVERY, width=32, depth=2, heads=2, length=14, positions=14, valid_every=12
        ),
        _of("uniter", "uniter", **_SMALL, length=16, positions=16, regions=6, features=16, classes=7),
        _of("contrastive", str(HERE / "contrastive.py"), **_EVERY),
        _of("two_stages", str(HERE / "two_stages.py"), **_EVERY),
    ]
)

BROKEN = Case("broken", str(HERE / "broken.py"), {})


def flags(case: Case, shards: dict[str, Sequence[str]]) -> list[str]:
    """A case on the command line, with exact sums and everything logged."""
    words = ["--exact", "--log-every", "1"]
    for name, value in case.numbers.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    for name, paths in shards.items():
        words += [f"--{name}", *paths]
    return words


def flip_payload(path: Path, *, sample: int, member: int = 0) -> None:
    """Turn one bit of a member, after the shard was indexed: it is met as damage."""
    index = open_shards(path).indexes[0]
    place = index.members(sample)[member].offset
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 16]))


def _write(folder: Path, split: str, count: int, case: Case) -> tuple[str, ...]:
    with shard_writer(folder, prefix=split, maxcount=50) as sink:
        for i, members in enumerate(case.samples(count, seed=len(split) + count)):
            sink.write({"__key__": f"{split}{i:04d}", **members})
    return tuple(str(path) for path in sink.paths)


def _captions(count: int, seed: int) -> list[dict[str, bytes]]:
    return [dict(sample.members) for sample in some_samples(count, seed=seed)]


def _melodies(count: int, seed: int) -> list[dict[str, bytes]]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        first, length = rng.normal(), rng.integers(4, 12)
        made.append({"notes": " ".join(f"{first + 0.2 * n:.3f}" for n in range(length)).encode()})
    return made
