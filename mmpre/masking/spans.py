"""Masks that pick runs of neighbouring tokens."""
# N tokens, M picked tokens, B rows, U units of a row, L lengths

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmpre.draw import Draw, Draws
from mmpre.masking.exact import ordinary_counts
from mmpre.masking.random import NEVER
from mmpre.masking.rows import lowest, one_row, row_numbers
from mmpre.masking.schedule import Share, check_share, share_at
from mmpre.masking.units import first_of_unit
from mmpre.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class StartedSpans:
    """Each ordinary token starts a span of `length` tokens with the same chance.

    Spans may overlap and end with the row. In every row at least `at_least` tokens start one (all of them where there
    are fewer). Away from the row's start a token is picked with a chance of 1 - (1 - chance)^length. Works on a row or
    on a batch; a device is waited for, to learn how many are picked.
    w2v-BERT (Chung et al. 2021, arXiv:2108.06209), as wav2vec 2.0: 10 frames, a chance of 0.065, so 0.489 of all; two
    spans leave a distractor to each picked frame.
    """

    at_once: ClassVar[bool] = True
    role: str
    chance: Share
    length: int
    at_least: int = 1

    def __post_init__(self) -> None:
        check_share("StartedSpans", "chance", self.chance)
        if self.length < 1 or self.at_least < 0:
            raise ValueError(
                f"StartedSpans: length must be at least 1 and at_least not negative, got length {self.length} and "
                f"at_least {self.at_least}"
            )

    def __call__(self, tokens: Tokens, draw: Draw | Draws) -> Int[Tensor, "M"]:
        """Return index_M, sorted."""
        device = tokens.special_N.device
        chance_N = draw.chances(tokens.lengths_B, "starts", device=device)
        chance_N = chance_N.masked_fill(tokens.special_N >= 0, NEVER)
        starts_N = chance_N < share_at("StartedSpans", "chance", self.chance, draw.step)
        if self.at_least:
            counts_B = ordinary_counts(tokens).clamp(max=self.at_least)
            starts_N[lowest(chance_N, tokens.lengths_B, counts_B)] = True
        number_N = torch.arange(len(tokens), device=device)
        latest_N = number_N.masked_fill(~starts_N, -self.length).cummax(0).values if len(tokens) else number_N
        start_B = tokens.lengths_B.cumsum(0) - tokens.lengths_B
        inside_N = latest_N >= start_B.to(device, non_blocking=True)[row_numbers(tokens)]
        picked_N = inside_N & (number_N - latest_N < self.length) & (tokens.special_N < 0)
        return picked_N.nonzero().squeeze(1)


@dataclass(frozen=True, kw_only=True)
class GeometricSpans:
    """Pick spans of whole units until a share of a row's ordinary tokens is reached. Works on one row.

    A span starts at any unit that is not picked yet; its length in units is geometric with chance `p`, drawn again
    where it is above `longest`. It ends early at the row's end, at a unit that is picked already, and at the budget
    (rounded up or down by chance), which is never passed unless by a first unit that is larger.
    SpanBERT (Joshi et al. 2019, arXiv:1907.10529): p = 0.2, at most 10, so 3.8 words on average. GPT-BERT's and
    ERNIE-Gram's baselines hide contiguous spans.
    """

    role: str
    share: Share
    unit: str = "word"
    p: float = 0.2
    longest: int = 10

    def __post_init__(self) -> None:
        check_share("GeometricSpans", "share", self.share)
        check_share("GeometricSpans", "p", self.p)
        if self.longest < 1:
            raise ValueError(f"GeometricSpans: longest must be at least 1, got {self.longest}")

    def __call__(self, tokens: Tokens, draw: Draw) -> Int[Tensor, "M"]:
        """Return index_M, sorted; empty only where every token is special."""
        one_row("GeometricSpans", tokens)
        free_N = tokens.special_N < 0
        first_N = first_of_unit(tokens, self.unit)
        first_U, size_U = first_N[free_N].unique_consecutive(return_counts=True)
        firsts, sizes = first_U.tolist(), size_U.tolist()
        share = share_at("GeometricSpans", "share", self.share, draw.step)
        budget = int(int(free_N.sum()) * share + draw.uniform("round"))
        rng = draw.rng("spans")
        starts = torch.randperm(len(sizes), generator=rng).tolist()
        lengths = (torch.multinomial(self.lengths_L, max(len(sizes), 1), True, generator=rng) + 1).tolist()
        taken, count = set(), 0
        for start, length in zip(starts, lengths, strict=False):
            if taken and count >= budget:
                break
            for u in range(start, min(start + length, len(sizes))):
                joined = u == start or firsts[u] == firsts[u - 1] + sizes[u - 1]  # no special token in between
                if u in taken or not joined or (count + sizes[u] > budget and taken):
                    break
                taken.add(u)
                count += sizes[u]
        return torch.isin(first_N, first_U[sorted(taken)]).logical_and_(free_N).nonzero().squeeze(1)

    @property
    def lengths_L(self) -> Float[Tensor, "L"]:
        """The chance of each length, from 1 to the longest."""
        chance_L = (1 - self.p) ** torch.arange(self.longest, dtype=torch.float64)
        return chance_L / chance_L.sum()
