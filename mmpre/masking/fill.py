"""Corruptions of a field's values, in place: zero, noise, given ones, another token's, another sample's.

None of them marks a token as replaced: the modality reads what stands there.
"""
# N tokens, M picked tokens

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from mmpre.draw import Draw, Draws
from mmpre.masking.protocol import Borrower, Corrupted, Corruption, untouched
from mmpre.masking.rows import row_numbers
from mmpre.tokens import Tokens


@dataclass(frozen=True)
class Zero:
    """Set a field to zero at the picked tokens.

    VIOLET (Fu et al. 2021, arXiv:2111.12681) blackens pixels; LXMERT (Tan & Bansal 2019, arXiv:1908.07490) zeroes 80
    percent of the picked regions' features.
    """

    at_once: ClassVar[bool] = True
    field: str

    def __call__(self, tokens: Tokens, index_M: Int[Tensor, "M"], draw: Draw | Draws) -> Corrupted:
        return _shown(tokens, self.field, index_M, 0)


@dataclass(frozen=True)
class Noise:
    """Set a field of numbers to normal noise of mean 0 at the picked tokens.

    w2v-BERT (Chung et al. 2021, arXiv:2108.06209) hides frames so; a public implementation takes a deviation of 0.1.
    """

    field: str
    deviation: float = 0.1

    def __post_init__(self) -> None:
        if not self.deviation > 0:
            raise ValueError(f"Noise: deviation must be above 0, got {self.deviation}; Zero shows nothing")

    def __call__(self, tokens: Tokens, index_M: Int[Tensor, "M"], draw: Draw) -> Corrupted:
        value_N = tokens[self.field]
        if not value_N.is_floating_point():
            raise ValueError(f"Noise: field {self.field!r} must hold floating-point numbers, got {value_N.dtype}")
        shape, device = (len(index_M), *value_N.shape[1:]), value_N.device
        noise_M = torch.randn(shape, generator=draw.rng("noise", device=device), device=device)
        return _shown(tokens, self.field, index_M, (noise_M * self.deviation).to(value_N.dtype))


@dataclass(frozen=True)
class Show:
    """Set a field to given values at the picked tokens, one for each of them.

    ELECTRA (Clark et al. 2020, arXiv:2003.10555) shows what its generator has sampled.
    """

    field: str
    value_M: Tensor

    def __call__(self, tokens: Tokens, index_M: Int[Tensor, "M"], draw: Draw) -> Corrupted:
        if len(self.value_M) != len(index_M):
            raise ValueError(
                f"Show: needs a value for each of {len(index_M)} picked tokens, got {len(self.value_M)} for "
                f"field {self.field!r}"
            )
        return _shown(tokens, self.field, index_M, self.value_M)


@dataclass(frozen=True)
class Swap:
    """Let the picked tokens of a row change places among themselves, in one random ring; a single one stays.

    Only `field` moves: positions stay, and which tokens show another one's value is read from clean and seen tokens.
    Multi-perspective contrast of replaced, swapped and inserted tokens (MCL) builds on it.
    """

    at_once: ClassVar[bool] = True
    field: str = "ids"

    def __call__(self, tokens: Tokens, index_M: Int[Tensor, "M"], draw: Draw | Draws) -> Corrupted:
        if not len(index_M):
            return untouched(tokens)
        device = index_M.device
        row_M = row_numbers(tokens)[index_M]
        order_M = draw.chances(tokens.lengths_B, "swap", device=device)[index_M].argsort()
        ring_M = index_M[order_M[row_M[order_M].argsort(stable=True)]]  # rows as before, random within each
        starts_M = torch.ones_like(row_M, dtype=torch.bool)
        starts_M[1:] = row_M[1:] != row_M[:-1]
        number_M = torch.arange(len(index_M), device=device)
        first_M = number_M.masked_fill(~starts_M, 0).cummax(0).values
        from_M = torch.where(starts_M.roll(-1), first_M, number_M + 1)
        return _shown(tokens, self.field, ring_M, tokens[self.field][ring_M[from_M]])


@dataclass(frozen=True)
class FromOther:
    """Show values of random tokens of another sample, which the data order chooses, at the picked tokens.

    Works on a row, in a view, which lends it the other sample's tokens of the same role.
    LXMERT shows another picture's feature at 10 percent of the picked regions.
    """

    field: str
    other: Callable[[], Tokens] | None = None

    def borrowing(self, other: Callable[[], Tokens]) -> "FromOther":
        return replace(self, other=other)

    def __call__(self, tokens: Tokens, index_M: Int[Tensor, "M"], draw: Draw) -> Corrupted:
        if self.other is None:
            raise ValueError("FromOther: nothing was lent; it works as the corruption of a view, on rows")
        if not len(index_M):
            return untouched(tokens)
        other = self.other()
        free_n = (other.special_N < 0).nonzero().squeeze(1)
        if not len(free_n):
            raise ValueError("FromOther: the other sample has no ordinary token")
        chosen_M = free_n[torch.randint(len(free_n), (len(index_M),), generator=draw.rng("other"))]
        return _shown(tokens, self.field, index_M, other[self.field][chosen_M])


@dataclass(frozen=True)
class Shares:
    """Corrupt each picked token by one of several corruptions, drawn by shares; the rest are kept as they are.

    On a device it waits once for each of them, to learn how many tokens it has.
    LXMERT: `Shares([(0.8, Zero("features")), (0.1, FromOther("features"))])`.
    """

    parts: Sequence[tuple[float, Corruption]]

    def __post_init__(self) -> None:
        shares = [share for share, _ in self.parts]
        if not shares or min(shares) < 0 or sum(shares) > 1 + 1e-6:
            raise ValueError(f"Shares: shares of the picked tokens must have a sum of at most 1, got {shares}")

    @property
    def at_once(self) -> bool:
        return all(getattr(corruption, "at_once", False) for _, corruption in self.parts)

    def borrowing(self, other: Callable[[], Tokens]) -> "Shares":
        return Shares([(s, one.borrowing(other) if isinstance(one, Borrower) else one) for s, one in self.parts])

    def __call__(self, tokens: Tokens, index_M: Int[Tensor, "M"], draw: Draw | Draws) -> Corrupted:
        device = index_M.device
        chance_M = draw.chances(tokens.lengths_B, "shares", device=device)[index_M]
        made, below = untouched(tokens), 0.0
        for number, (share, corruption) in enumerate(self.parts):
            chosen_M = index_M[(chance_M >= below) & (chance_M < below + share)]
            below += share
            one = corruption(made.tokens, chosen_M, draw.child("part", number))
            if one.index_map is not None:
                raise ValueError(f"Shares: {type(corruption).__name__} moves tokens; it can only stand alone")
            made = Corrupted(one.tokens, made.replaced_N | one.replaced_N)
        return made


def _shown(tokens: Tokens, field: str, index_M: Int[Tensor, "M"], value: Tensor | int) -> Corrupted:
    values_N = tokens[field]
    if len(values_N) != len(tokens):
        raise ValueError(
            f"a corruption of field {field!r}: it must have one entry a token, got {len(values_N)} for {len(tokens)}"
        )
    values_N = values_N.clone()
    values_N[index_M] = value
    return untouched(tokens.with_values(**{field: values_N}))
