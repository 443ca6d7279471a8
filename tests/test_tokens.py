from dataclasses import replace

import pytest
import torch

from mmpre.batch import Picked, Row, pack
from mmpre.draw import Draw, hashed
from mmpre.layout import Layout
from mmpre.tokens import Ragged, Tokens


def row(key, text, image, picked=()):
    roles = {"text": tokens(text), "image": tokens(image)}
    index = torch.tensor(picked, dtype=torch.int64)
    return Row(
        key=key, clean=roles, seen=roles, picked={"word": Picked("text", index, index)},
        replaced={role: torch.zeros(len(one), dtype=torch.bool) for role, one in roles.items()},
        labels={"matched": torch.tensor(len(key))},
    )  # fmt: skip


def tokens(ids):
    ids = torch.tensor(ids, dtype=torch.int64)
    return Tokens.of_row(torch.full((len(ids),), -1), ids=ids)


def test_draws_are_frozen_and_depend_on_purpose_and_place_but_not_on_the_step_for_rows():
    assert hashed(0, "word", 1) == 8176794306369221006
    row = Draw.row(1, 0, 5, epoch=2, unit=7)
    assert row.hash("mask") == Draw.row(1, 0, 6, epoch=2, unit=7).hash("mask")
    assert row.hash("mask") != row.hash("corrupt") != Draw.row(1, 0, 5, epoch=3, unit=7).hash("mask")
    assert hashed("1") != hashed(1)
    assert torch.equal(torch.rand(3, generator=row.rng("a")), torch.rand(3, generator=row.rng("a")))
    mean = sum(Draw.row(1, 0, 0, epoch=0, unit=u).uniform("x") for u in range(2000)) / 2000
    assert abs(mean - 0.5) < 0.03


def test_pack_lays_each_row_role_after_role_shortest_row_first():
    batch = pack([row("long", [1, 2, 3], [10, 11], [2]), row("ab", [4], [12], [0])], plan_of=lambda layout, batch: None)
    assert batch.keys == ["ab", "long"]
    place_ids = torch.empty(batch.layout.size, dtype=torch.int64)
    for role in ("text", "image"):
        place_ids[batch.layout.index[role]] = batch.seen[role]["ids"]
    assert place_ids.tolist() == [4, 12, 1, 2, 3, 10, 11]
    together = torch.cat([batch.seen["text"]["ids"], batch.seen["image"]["ids"]])
    assert together[batch.layout.source_N].tolist() == place_ids.tolist()
    assert place_ids[batch.layout.at("text", batch.picked["word"].seen_M)].tolist() == [4, 3]
    assert place_ids[batch.layout.first("image")].tolist() == [12, 10]
    assert batch.layout.groups == [(1, 2), (1, 5)]
    assert batch.layout.row_N.tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert batch.labels["matched"].tolist() == [2, 4]
    assert batch.counts == {"rows": 2, "tokens": 7, "picked:word": 2, "ordinary:word": 4, "labelled:matched": 2}


def test_a_place_that_is_no_more_is_not_taken_for_the_last_one():
    batch = pack([row("long", [1, 2, 3], [10, 11])], plan_of=lambda layout, batch: None)
    with pytest.raises(IndexError):
        batch.layout.at("text", torch.tensor([0, -1]))  # of a dropped token


@pytest.mark.parametrize(("what", "odd"), [("picks", {"picked": {}}), ("labels", {"labels": {}})])
def test_rows_that_differ_in_what_is_known_of_them_are_refused(what, odd):
    rows = [row("a", [1], [2], [0]), replace(row("b", [1], [2], [0]), **odd)]
    name = {"picks": "word", "labels": "matched"}[what]
    with pytest.raises(ValueError, match=f"must have the same {what}, some alone have {name}"):
        pack(rows, plan_of=lambda layout, batch: None)


def test_equal_lengths_keep_their_order_and_a_row_may_lack_a_role():
    batch = pack(
        [row("b", [1, 2], []), row("a", [3], [9]), row("c", [4, 5], [])], plan_of=lambda layout, batch: layout.groups
    )
    assert batch.keys == ["b", "a", "c"]
    assert batch.plan == [(3, 2)]
    assert batch.layout.index["image"].tolist() == [3]
    with pytest.raises(ValueError, match="row 0 has no token of role 'image'"):
        batch.layout.first("image")


def test_references_are_shifted_when_rows_are_packed():
    def graph(ids, edges):
        edges = torch.tensor(edges)
        return Tokens.of_row(
            torch.full((len(ids),), -1), ids=torch.tensor(ids),
            edges=Ragged(edges, torch.tensor([len(edges)]), refers_to="tokens"),
        )  # fmt: skip

    packed = Tokens.pack([graph([5, 6, 7], [[0, 2]]), graph([8, 9], [[1, 0], [0, 1]])])
    assert packed["edges"].tolist() == [[0, 2], [4, 3], [3, 4]]
    assert packed.fields["edges"].lengths_B.tolist() == [1, 2]
    again = Tokens.pack([packed, graph([1], [[0, 0]])])
    assert again["edges"].tolist()[-1] == [5, 5]


def test_a_dropped_pick_stays_dropped_when_packed():
    kept = tokens([1, 2, 3])
    index = torch.tensor([0, 2])
    rows = [
        Row(key=k, clean={"t": kept}, seen={"t": tokens([1, 2])}, replaced={"t": torch.zeros(2, dtype=torch.bool)},
            picked={"p": Picked("t", index, torch.tensor([0, -1]))})
        for k in "xy"
    ]  # fmt: skip
    picked = pack(rows, plan_of=lambda layout, batch: None).picked["p"]
    assert picked.clean_M.tolist() == [0, 2, 3, 5]
    assert picked.seen_M.tolist() == [0, -1, 2, -1]


def test_rows_with_other_fields_and_unknown_fields_are_refused_by_name():
    with pytest.raises(ValueError, match=r"same fields.*\['ids'\] and \['other'\]"):
        Tokens.pack([tokens([1]), Tokens.of_row(torch.tensor([-1]), other=torch.tensor([1]))])
    with pytest.raises(KeyError, match="no field 'box'"):
        tokens([1])["box"]


def test_a_layout_moves_and_holds_the_same_places():
    layout = Layout({"a": torch.tensor([2, 0, 1]), "b": torch.tensor([1, 1, 2])})
    places = torch.cat([layout.index["a"], layout.index["b"]])
    assert sorted(places.tolist()) == list(range(7))
    moved = layout.to("meta")
    assert moved.index["a"].device.type == "meta"
    assert moved.source_N.shape == layout.source_N.shape
