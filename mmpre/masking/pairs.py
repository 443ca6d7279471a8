"""Pairs of tokens that are asked for: edges of a graph, or links between two kinds of tokens.

A cut (`View.cuts`) takes some pairs out of a field, so that attention does not show them, and puts questions in their
place; a pick takes both ends of each question, and a head (heads/pairs.py) answers from their states.
"""
# N tokens of one row, R rows and C columns of the pairs' table, P questions

from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from mmpre.draw import Draw
from mmpre.masking.rows import one_row
from mmpre.tokens import Ragged, Tokens


@dataclass(frozen=True, kw_only=True)
class AskPairs:
    """Take all pairs of a share of the nodes out of `field`, and ask for them and for as many that are none.

    `field` holds pairs of tokens of the row, (E, 2): first a token that `nodes` marks, then another of them, or one
    that `others` marks. The number of nodes, share x nodes, is rounded up or down by chance, at least 1. Pairs that are
    none are drawn among all that touch a drawn node, as first or, among nodes, as second end; a node and itself are not
    asked for. Makes two fields: FIELD_asked [P, 2], and FIELD_true [P], 1 for those that were there.
    Source: edge prediction and node alignment of GraphCodeBERT, Guo et al. 2020, arXiv:2009.08366, both with 0.2.
    """

    field: str = "edge"
    nodes: str = "node"
    others: str | None = None
    share: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"AskPairs: share must lie above 0 and reach to 1, got {self.share}; a fifth is 0.2")

    def __call__(self, tokens: Tokens, draw: Draw) -> Tokens:
        one_row("AskPairs", tokens)
        row_R = tokens[self.nodes].nonzero().squeeze(1)
        column_C = row_R if self.others is None else tokens[self.others].nonzero().squeeze(1)
        count = int(len(row_R) * self.share + draw.uniform("round", self.field))
        count = max(count, 1) if len(row_R) else 0
        drawn_R = torch.zeros(len(row_R), dtype=torch.bool)
        drawn_R[torch.randperm(len(row_R), generator=draw.rng("nodes", self.field))[:count]] = True
        touched_RC = drawn_R[:, None].repeat(1, len(column_C))
        if self.others is None:
            touched_RC |= drawn_R
            touched_RC.fill_diagonal_(False)
        pair_E2 = tokens[self.field]
        true_RC = torch.zeros_like(touched_RC)
        row_E, column_E = self._find(row_R, pair_E2[:, 0]), self._find(column_C, pair_E2[:, 1])
        true_RC[row_E, column_E] = True
        itself_E = pair_E2[:, 0] == pair_E2[:, 1]
        hidden_E = touched_RC[row_E, column_E] | (itself_E & drawn_R[row_E])
        yes = (true_RC & touched_RC).nonzero()
        no = (~true_RC & touched_RC).nonzero()
        no = no[torch.randperm(len(no), generator=draw.rng("others", self.field))[: len(yes)]]
        asked_P2 = torch.cat([yes, no])
        asked_P2 = torch.stack([row_R[asked_P2[:, 0]], column_C[asked_P2[:, 1]]], 1)
        true_P = torch.arange(len(asked_P2)) < len(yes)
        made = {self.field: pair_E2[~hidden_E], f"{self.field}_asked": asked_P2}
        if clash := {f"{self.field}_asked", f"{self.field}_true"} & tokens.fields.keys():
            raise ValueError(f"AskPairs: the tokens have fields {sorted(clash)} already, from another cut")
        fields = {name: Ragged(pairs, torch.tensor([len(pairs)]), "tokens") for name, pairs in made.items()}
        fields[f"{self.field}_true"] = Ragged(true_P.long(), torch.tensor([len(true_P)]))
        return replace(tokens, fields={**tokens.fields, **fields})

    def _find(self, token_R: Int[Tensor, "R"], end_E: Int[Tensor, "E"]) -> Int[Tensor, "E"]:
        """The number of each end among the marked tokens."""
        number_E = torch.searchsorted(token_R, end_E.contiguous())
        if (number_E == len(token_R)).any() or not torch.equal(token_R[number_E], end_E):
            raise ValueError(
                f"AskPairs: field {self.field!r} must hold pairs of a token that {self.nodes!r} marks and one that "
                f"{self.others or self.nodes!r} marks; it has others"
            )
        return number_E


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Pick both ends of each pair that `AskPairs` asks for, one pair after the other.

    They are special tokens where nodes are, come in the order of the pairs, and may come several times. Works on a row.
    """

    role: str
    field: str = "edge"

    def __call__(self, tokens: Tokens, draw: Draw) -> Int[Tensor, "M"]:
        """Return index_M, two for each pair."""
        return tokens[f"{self.field}_asked"].flatten()


@dataclass(frozen=True, kw_only=True)
class ShufflePairs:
    """Give each pair of `field` the second end of another one: as many pairs, and each token in as many of them, that
    tell nothing. What a graph is worth shows beside it. Cut after `AskPairs` (`InTurn`), it leaves the questions true.
    """

    field: str = "edge"

    def __call__(self, tokens: Tokens, draw: Draw) -> Tokens:
        one_row("ShufflePairs", tokens)
        first_E, second_E = tokens[self.field].unbind(1)
        order_E = torch.randperm(len(second_E), generator=draw.rng("shuffle", self.field))
        return tokens.with_values(**{self.field: torch.stack([first_E, second_E[order_E]], 1)})
