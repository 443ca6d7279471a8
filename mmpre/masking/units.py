"""Units: tokens that are picked and hidden together, such as a word's pieces or an n-gram.

A unit is a run of neighbouring tokens with the same number in a field. The text reader numbers words in `word`; a cut
(`View.cuts`) makes a field of its own once a row is read. A number below 0 makes a token a unit of its own.
"""
# N tokens, M picked tokens, U units of a row

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Int
from torch import Tensor

from mmpre.draw import Draw
from mmpre.masking.rows import one_row, row_numbers
from mmpre.masking.schedule import Share, check_share, share_at
from mmpre.tokens import Ragged, Tokens


def first_of_unit(tokens: Tokens, unit: str) -> Int[Tensor, "N"]:
    """For each token the number of its unit's first token; a special token is a unit of its own. Row or batch."""
    unit_N, row_N = tokens[unit], row_numbers(tokens)
    if len(unit_N) != len(tokens):
        raise ValueError(
            f"first_of_unit: field {unit!r} must number the unit of each of {len(tokens)} tokens, it has {len(unit_N)}"
        )
    starts_N = (unit_N < 0) | (tokens.special_N >= 0)
    starts_N[1:] |= (unit_N[1:] != unit_N[:-1]) | (row_N[1:] != row_N[:-1]) | (tokens.special_N[:-1] >= 0)
    number_N = torch.arange(len(tokens), device=unit_N.device)
    return number_N.masked_fill(~starts_N, 0).cummax(0).values if len(tokens) else number_N


@dataclass(frozen=True, kw_only=True)
class WholeUnits:
    """Pick whole units in random order until a share of a row's ordinary tokens is reached. Works on one row.

    The number of tokens to pick, share x tokens, is rounded up or down by chance, so that it is right on average. A
    unit that would pass it is left out for a smaller one; with `past` it is picked, and is the last. At least one unit
    is picked.
    Whole words are BERT's later `whole word masking`; `past`, over random spans as units, is GPT-BERT's (Charpentier &
    Samuel 2024, arXiv:2410.24159), as in the authors' code.
    """

    role: str
    share: Share
    unit: str = "word"
    past: bool = False

    def __post_init__(self) -> None:
        check_share("WholeUnits", "share", self.share)

    def __call__(self, tokens: Tokens, draw: Draw) -> Int[Tensor, "M"]:
        """Return index_M, sorted; empty only where every token is special."""
        one_row("WholeUnits", tokens)
        free_N = tokens.special_N < 0
        first_N = first_of_unit(tokens, self.unit)
        first_U, size_U = first_N[free_N].unique_consecutive(return_counts=True)
        share = share_at("WholeUnits", "share", self.share, draw.step)
        budget = int(int(free_N.sum()) * share + draw.uniform("round"))
        sizes, taken, count = size_U.tolist(), [], 0
        for u in torch.randperm(len(sizes), generator=draw.rng("order")).tolist():
            if taken and count >= budget:
                break
            if self.past or count + sizes[u] <= budget:
                taken.append(u)
                count += sizes[u]
        if not taken and sizes:  # all are larger than the budget
            taken = [int(draw.uniform("only") * len(sizes))]
        return torch.isin(first_N, first_U[taken]).logical_and_(free_N).nonzero().squeeze(1)


@dataclass(frozen=True)
class RandomLengths:
    """Cut a row into spans whose lengths are drawn from `lengths`, each as likely; the last one may be shorter.

    GPT-BERT's spans of 1, 2 and 3 tokens.
    """

    lengths: Sequence[int]
    field: str = "span"

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"RandomLengths: wanted at least one length of 1 or more, got {list(self.lengths)}")

    def __call__(self, tokens: Tokens, draw: Draw) -> Tokens:
        free_N = tokens.special_N < 0
        count = int(free_N.sum())
        drawn = torch.randint(len(self.lengths), (count,), generator=draw.rng("lengths"))
        length_S = torch.tensor(self.lengths)[drawn]
        span_N = torch.full((len(tokens),), -1)
        span_N[free_N] = torch.searchsorted(length_S.cumsum(0), torch.arange(count), right=True)
        return with_field(tokens, self.field, span_N)


@dataclass(frozen=True)
class NGrams:
    """Cut a row into n-grams of a lexicon, from the left the longest that fits (maximum matching), and single tokens.

    `lexicon` gives tuples of ids. Makes two fields: `field`, the number of each token's unit in the row, and
    `FIELD_id`, the unit's identity at each of its tokens: the id of a single token, `first_id` + the n-gram's number
    in the lexicon otherwise.
    ERNIE-Gram, Xiao et al. 2020, arXiv:2010.12148.
    """

    lexicon: Sequence[tuple[int, ...]]
    first_id: int
    field: str = "ngram"
    ids: str = "ids"

    def __post_init__(self) -> None:
        if short := [gram for gram in self.lexicon if len(gram) < 2]:
            raise ValueError(f"NGrams: an n-gram needs at least two ids, got {short[0]}")

    def __call__(self, tokens: Tokens, draw: Draw) -> Tokens:
        ids, special = tokens[self.ids].tolist(), tokens.special_N.tolist()
        unit, identity, start, number = [-1] * len(ids), list(ids), 0, 0
        while start < len(ids):
            size = 1
            if special[start] < 0:
                for longer in range(min(self._longest, len(ids) - start), 1, -1):
                    found = self._numbers.get(tuple(ids[start : start + longer]))
                    if found is not None and max(special[start : start + longer]) < 0:
                        size, identity[start : start + longer] = longer, [self.first_id + found] * longer
                        break
                unit[start : start + size] = [number] * size
                number += 1
            start += size
        made = with_field(tokens, self.field, torch.tensor(unit, dtype=torch.int64))
        return with_field(made, f"{self.field}_id", torch.tensor(identity, dtype=torch.int64))

    @cached_property
    def _numbers(self) -> Mapping[tuple[int, ...], int]:
        return {gram: number for number, gram in enumerate(self.lexicon)}

    @cached_property
    def _longest(self) -> int:
        return max((len(gram) for gram in self.lexicon), default=1)


@dataclass(frozen=True)
class InTurn:
    """Several cuts of one role, each of what the one before it made."""

    cuts: Sequence[Callable[[Tokens, Draw], Tokens]]

    def __call__(self, tokens: Tokens, draw: Draw) -> Tokens:
        for cut in self.cuts:
            tokens = cut(tokens, draw)
        return tokens


def with_field(tokens: Tokens, name: str, value_N: Tensor) -> Tokens:
    """The same tokens of a row with one more field. Raises ValueError where it has one of this name."""
    if name in tokens.fields:
        raise ValueError(f"with_field: the tokens have a field {name!r} already, from their reader or another cut")
    return replace(tokens, fields={**tokens.fields, name: Ragged(value_N, tokens.lengths_B)})
