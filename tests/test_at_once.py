"""Masks and corruptions that take the rows of a micro-batch at once make of each row what they make of it alone."""

from dataclasses import replace

import pytest
import torch
from masking import row, words

from mmpre.draw import Draw, Draws
from mmpre.masking.corrupt import BertReplace, HideAll
from mmpre.masking.drop import Collapse, Drop, Insert
from mmpre.masking.everything import Everything
from mmpre.masking.exact import ExactShare
from mmpre.masking.fill import FromOther, Noise, Shares, Swap, Zero
from mmpre.masking.random import RandomTokens
from mmpre.masking.spans import StartedSpans
from mmpre.masking.units import WholeUnits
from mmpre.tokens import Ragged, Tokens
from mmpre.view import Dealt, Read, View

MASKS = [
    RandomTokens(role="text", rate=0.3),
    RandomTokens(role="text", rate=0.05),
    RandomTokens(role="text", rate=0.05, at_least_one=False),
    RandomTokens(role="text", rate=0.3, unit="word"),
    ExactShare(role="text", share=0.6),
    StartedSpans(role="text", chance=0.1, length=3, at_least=2),
    Everything(role="text"),
]
CORRUPTIONS = [
    BertReplace(mask_id=7, random_ids=(10, 5_000), mask=0.4, random=0.4),
    BertReplace(mask_id=7, random_ids=(10, 5_000), unit="word"),
    HideAll(),
    Drop(),
    Collapse(),
    Collapse("word"),
    Insert(),
    Swap(),
    Shares([(0.5, Zero("ids")), (0.3, Swap())]),
]


def read(unit, *sizes):
    """A text of some words, and a picture that no mask picks, whose field `edge` refers to its tokens."""
    edge_E2 = torch.tensor([[0, i] for i in range(unit % 3)], dtype=torch.int64).reshape(-1, 2)
    edges = Ragged(edge_E2, torch.tensor([len(edge_E2)]), "tokens")
    picture = Tokens.of_row(torch.full((3,), -1), patch=torch.arange(3), edge=edges)
    clean = {"text": words(*sizes), "image": picture}
    return Read(f"{unit}", clean, {"view": torch.tensor(unit % 2)}, {}, None, row(unit))


@pytest.fixture
def rows():
    return [read(0, 2, 1, 3), read(1), read(2, 1), read(3, *[1, 2, 4] * 20), read(4, 9, 1), read(5, 2, 2, 2, 2, 2)]


def told(one):
    """Everything that a row or a batch has, as plain values."""
    tokens = {
        f"{side} {role} {name}": (part.values.tolist(), part.lengths_B.tolist(), part.refers_to)
        for side in ("clean", "seen") for role, some in getattr(one, side).items()
        for name, part in {**some.fields, "special": Ragged(some.special_N, some.lengths_B)}.items()
    }  # fmt: skip
    picked = {name: (p.role, p.clean_M.tolist(), p.seen_M.tolist()) for name, p in one.picked.items()}
    replaced = {role: some.tolist() for role, some in one.replaced.items()}
    return tokens, picked, replaced, {name: label.tolist() for name, label in one.labels.items()}


@pytest.mark.parametrize("corruption", [None, *CORRUPTIONS])
@pytest.mark.parametrize("mask", MASKS)
def test_rows_masked_at_once_are_those_masked_alone(mask, corruption, rows):
    view = View(picks={"word": mask}, corruption=corruption)
    assert view.at_once
    made = view.masked(rows)
    assert [told(one) for one in made] == [told(view.mask(one)) for one in rows]
    assert sum(len(one.picked["word"]) for one in made) > 0
    assert [told(one) for one in view.masked(rows[::-1])] == [told(one) for one in made[::-1]]


def test_dealt_rows_are_masked_by_their_own_view(rows):
    parts = {"words": (1, View(picks={"word": MASKS[0]}, corruption=HideAll())),
             "next": (1, View(picks={"all": Everything(role="text")}))}  # fmt: skip
    view = Dealt(parts)
    made = view.masked(rows)
    assert [told(one) for one in made] == [told(view.mask(one)) for one in rows]
    assert [sorted(name for name, one in row.picked.items() if len(one)) for row in made[:4]] == [
        ["word"], [], ["word"], ["all"]
    ]  # fmt: skip


def test_a_view_with_a_part_that_works_on_single_rows_is_not_at_once():
    mask = MASKS[0]
    assert View(picks={"word": mask}, corruption={"word": HideAll()}).at_once and View().at_once
    assert not View(picks={"word": WholeUnits(role="text", share=0.2)}).at_once
    assert not View(picks={"word": mask}, corruption=Noise("ids")).at_once
    assert not View(picks={"word": mask}, corruption=Shares([(0.5, FromOther("ids"))])).at_once
    assert not Dealt({"a": (1, View()), "b": (1, View(picks={"word": lambda tokens, draw: None}))}).at_once


def test_packed_tokens_are_split_into_the_rows_they_were_packed_of(rows):
    for role in ("text", "image"):
        clean = [one.clean[role] for one in rows]
        again = Tokens.pack(clean).split()
        assert [told(replace_clean(one, role)) for one in again] == [told(replace_clean(one, role)) for one in clean]


def replace_clean(tokens, role):
    return replace(View().mask(read(0)), clean={role: tokens}, seen={})


def test_the_numbers_of_a_token_depend_on_its_row_and_place_alone():
    length_B = torch.tensor([3, 0, 5])
    draws = Draws.of([row(4), row(5), row(6)])
    together = draws.chances(length_B, "a"), draws.below(1000, length_B, "a")
    alone = [row(unit).chances(length_B[i : i + 1], "a") for i, unit in enumerate((4, 5, 6))]
    assert torch.equal(together[0], torch.cat(alone))
    alone = [row(unit).below(1000, length_B[i : i + 1], "a") for i, unit in enumerate((4, 5, 6))]
    assert torch.equal(together[1], torch.cat(alone))
    assert torch.equal(row(4).chances(torch.tensor([9]), "a")[:3], together[0][:3])
    assert torch.equal(draws.child("b").chances(length_B, "a")[:3], row(4).child("b").chances(length_B[:1], "a"))
    assert not torch.equal(draws.chances(length_B, "b"), together[0])


def test_numbers_are_frozen_and_spread_evenly():
    draw, length_1 = Draw.row(1, 0, 5, epoch=2, unit=7), torch.tensor([100_000])
    chance_N, whole_N = draw.chances(length_1, "mask"), draw.below(7, length_1, "mask")
    assert (chance_N[:3] * 2**24).tolist() == [10661492, 16165254, 8894946]
    assert draw.below(1 << 32, length_1, "mask")[:3].tolist() == [2729342190, 4138305165, 2277106299]
    assert chance_N.dtype == torch.float32 and 0 <= chance_N.min() and chance_N.max() < 1
    share_T = torch.bincount((chance_N * 10).long(), minlength=10) / len(chance_N)
    assert (share_T - 0.1).abs().max() < 0.005
    assert (torch.bincount(whole_N, minlength=7) / len(whole_N) - 1 / 7).abs().max() < 0.005
    assert abs(torch.corrcoef(torch.stack([chance_N[1:], chance_N[:-1]]))[0, 1]) < 0.015
