"""Where randomness comes from: a hash of what is drawn, never a generator that is carried along.

Two draws of the same thing are equal whoever draws them, so a run does not depend on how many processes or loading
workers share it, nor on where it was interrupted.
"""

# N tokens of all rows, B rows

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int, UInt
from torch import Tensor

Key = int | str
GOLDEN = 0x9E3779B97F4A7C15


def hashed(*key: Key) -> int:
    """Hash a key to 63 bits, equally on every machine and in every version of Python."""
    text = "\x1f".join([f"{type(part).__name__[0]}{part}" for part in key])
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
        return Draw(self.seed, self.stage, self.step, (*self.place, *purpose), self.index)

    def whole(self) -> "Draw":
        """The draw of the row or micro-batch that this one is a child of: the same for all of its purposes."""
        return replace(self, place=self.place[:3])

    def hash(self, *purpose: Key) -> int:
        return hashed(self.seed, self.stage, *self.place, *purpose)

    def chances(
        self, lengths_B: Int[Tensor, "B"], *purpose: Key, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "N"]:
        """A number in [0, 1), in steps of 2^-24, for each token of rows that have `lengths_B`, a tensor on the CPU.

        On the CPU a hash of the draw and the token's place among all, so that `Draws` can give many rows theirs at
        once; elsewhere what torch's generator gives there.
        """
        if torch.device(device).type == "cpu":
            return Draws.of((self,)).chances(lengths_B.sum(0, keepdim=True), *purpose)
        return torch.rand(int(lengths_B.sum()), generator=self.rng(*purpose, device=device), device=device)

    def below(
        self, bound: int, lengths_B: Int[Tensor, "B"], *purpose: Key, device: torch.device | str = "cpu"
    ) -> Int[Tensor, "N"]:
        """A whole number from 0 to `bound` - 1 for each token, all as likely but for a share of bound / 2^32."""
        if torch.device(device).type == "cpu":
            return Draws.of((self,)).below(bound, lengths_B.sum(0, keepdim=True), *purpose)
        size = (int(lengths_B.sum()),)
        return torch.randint(bound, size, generator=self.rng(*purpose, device=device), device=device)

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


@dataclass(frozen=True)
class Draws:
    """The draws of a batch's rows, for one purpose: each row's numbers are those that its own draw gives it alone."""

    key_B: UInt[np.ndarray, "B"]
    step: int
    purpose: tuple[Key, ...]

    @staticmethod
    def of(rows: Sequence[Draw]) -> "Draws":
        """Of rows that are drawn for one purpose, such as one of two views."""
        keys = [hashed(row.seed, row.stage, *row.place[:3]) for row in rows]
        return Draws(np.array(keys, dtype=np.uint64), rows[0].step, rows[0].place[3:])

    def child(self, *purpose: Key) -> "Draws":
        return replace(self, purpose=(*self.purpose, *purpose))

    def chances(
        self, lengths_B: Int[Tensor, "B"], *purpose: Key, device: torch.device | str = "cpu"
    ) -> Float[Tensor, "N"]:
        return torch.from_numpy((self._bits(lengths_B, purpose) >> np.uint64(40)).astype(np.float32) * 2**-24)

    def below(
        self, bound: int, lengths_B: Int[Tensor, "B"], *purpose: Key, device: torch.device | str = "cpu"
    ) -> Int[Tensor, "N"]:
        bits_N = (self._bits(lengths_B, purpose) >> np.uint64(32)) * np.uint64(bound)
        return torch.from_numpy((bits_N >> np.uint64(32)).astype(np.int64))

    def _bits(self, lengths_B: Int[Tensor, "B"], purpose: Sequence[Key]) -> UInt[np.ndarray, "N"]:
        """A hash of each token's row, purpose and place in the row: SplitMix64's stream from row and purpose."""
        length_B = lengths_B.numpy()
        start_B = mix(self.key_B + np.uint64(hashed(*self.purpose, *purpose)))
        first_B = (length_B.cumsum() - length_B).astype(np.uint64)
        start_N = np.repeat(start_B - first_B * np.uint64(GOLDEN), length_B)
        return mix(start_N + np.arange(len(start_N), dtype=np.uint64) * np.uint64(GOLDEN))


def mix(x: UInt[np.ndarray, "*P"]) -> UInt[np.ndarray, "*P"]:
    """SplitMix64's finalizer (Steele et al. 2014): a bijection of 64 bits in which every bit depends on every bit."""
    x = x + np.uint64(GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
