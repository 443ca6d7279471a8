"""Where randomness comes from: a hash of what is drawn, never a generator that is carried along.

Two draws of the same thing are equal whoever draws them, so a run does not depend on how many processes or loading
workers share it, nor on where it was interrupted.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

Key = int | str


def hashed(*key: Key) -> int:
    """Hash a key to 63 bits, equally on every machine and in every version of Python."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class Draw:
    """The randomness of one row or of one micro-batch, and the step that schedules read.

    `place` says what is drawn: ("row", epoch, unit) for augmentation, masks and donors, ("micro", step, m) for
    dropout and sampled tokens. `step` is no part of a row's key: the same unit in the same epoch is drawn alike. Nor is
    `index`, the row's number in its step, by which rows are dealt to views (`Dealt`).
    """

    seed: int
    stage: int
    step: int
    place: tuple[Key, ...]
    index: int = 0

    @staticmethod
    def row(seed: int, stage: int, step: int, *, epoch: int, unit: int, index: int = 0) -> "Draw":
        return Draw(seed, stage, step, ("row", epoch, unit), index)

    @staticmethod
    def micro_batch(seed: int, stage: int, step: int, m: int) -> "Draw":
        return Draw(seed, stage, step, ("micro", step, m))

    def child(self, *purpose: Key) -> "Draw":
        """A draw of its own for one purpose, such as one of two views of a row."""
        return replace(self, place=(*self.place, *purpose))

    def whole(self) -> "Draw":
        """The draw of the row or micro-batch that this one is a child of: the same for all of its purposes."""
        return replace(self, place=self.place[:3])

    def hash(self, *purpose: Key) -> int:
        return hashed(self.seed, self.stage, *self.place, *purpose)

    def rng(self, *purpose: Key, device: torch.device | str = "cpu") -> torch.Generator | None:
        """A fresh generator for one purpose; two calls with the same purpose give the same numbers.

        None on the meta device, where nothing is drawn.
        """
        if torch.device(device).type == "meta":
            return None
        return torch.Generator(device).manual_seed(self.hash(*purpose))

    @contextmanager
    def seeding_torch(self, *purpose: Key) -> Iterator[None]:
        """For code that draws from torch's own generator (torchvision): seeded here, and left as it was before."""
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(self.hash(*purpose))
        try:
            yield
        finally:
            generator.set_state(state)

    def uniform(self, *purpose: Key) -> float:
        """One number in [0, 1)."""
        return (self.hash(*purpose) >> 10) / (1 << 53)
