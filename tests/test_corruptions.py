"""Corruptions: what they show, what they say of it, and that a row and a batch fare alike."""

import pytest
import safetensors.torch
import torch
from masking import ROWS, packed, per_row, row, some_tokens, words
from parity_text import some_batch, some_samples, word_tokenizer

from mmpre.batch import Picked
from mmpre.draw import Draw
from mmpre.masking.corrupt import BertReplace, HideAll
from mmpre.masking.drop import Collapse, Drop, Insert
from mmpre.masking.exact import ExactShare
from mmpre.masking.fill import FromOther, Noise, Shares, Show, Swap, Zero
from mmpre.masking.on_device import hide
from mmpre.masking.random import RandomTokens
from mmpre.masking.supplied import Supplied
from mmpre.masking.units import NGrams, RandomLengths, WholeUnits
from mmpre.modalities.regions import RegionReader
from mmpre.modalities.text import TextReader
from mmpre.tokens import Ragged, Tokens
from mmpre.view import View

BATCH = Draw.micro_batch(0, 0, 0, 0)


def speech(length):
    torch.manual_seed(length)
    return some_tokens(length, frame=torch.randn(length, 8))


@pytest.mark.parametrize("corruption", [HideAll(), Drop(), Collapse(), Collapse("word"), Insert(), Zero("ids")])
def test_a_batch_is_corrupted_like_its_rows(corruption):
    rows = [words(1, 3, 2, 1), words(2, 2), words(1), words(4, 1, 1, 3)]
    mask = WholeUnits(role="text", share=0.4)
    index = [mask(tokens, row(i)) for i, tokens in enumerate(rows)]
    alone = [corruption(tokens, index_M, row(i)) for i, (tokens, index_M) in enumerate(zip(rows, index, strict=True))]
    start_B = torch.tensor([0, *(len(tokens) for tokens in rows)]).cumsum(0)
    index_M = torch.cat([one + start for one, start in zip(index, start_B.tolist(), strict=False)])
    batch = corruption(Tokens.pack(rows), index_M, BATCH)
    expected = Tokens.pack([one.tokens for one in alone])
    assert torch.equal(batch.tokens.lengths_B, expected.lengths_B)
    assert torch.equal(batch.tokens.special_N, expected.special_N)
    for name in ("ids", "word", "position"):
        assert torch.equal(batch.tokens[name], expected[name]), name
        assert torch.equal(batch.tokens.fields[name].lengths_B, expected.lengths_B)
    assert torch.equal(batch.replaced_N, torch.cat([one.replaced_N for one in alone]))
    if batch.index_map is not None:
        seen = torch.tensor([0, *(len(one.tokens) for one in alone)]).cumsum(0).tolist()
        moved = [torch.where(a.index_map < 0, -1, a.index_map + s) for a, s in zip(alone, seen, strict=False)]
        assert torch.equal(batch.index_map, torch.cat(moved))
        for name in batch.also:
            clean_M = torch.cat([one.also[name][0] + s for one, s in zip(alone, start_B.tolist(), strict=False)])
            assert torch.equal(batch.also[name][0], clean_M)


def test_zero_and_noise_touch_the_picked_entries_of_their_field_only():
    tokens, index_M = speech(2_000), torch.arange(1, 1_999, 2)
    zero = Zero("frame")(tokens, index_M, row(0))
    noise = Noise("frame", 0.1)(tokens, index_M, row(0))
    other_N = torch.ones(2_000, dtype=torch.bool).index_fill(0, index_M, False)
    for made in (zero, noise):
        assert torch.equal(made.tokens["frame"][other_N], tokens["frame"][other_N])
        assert made.tokens["position"] is tokens["position"]
        assert not made.replaced_N.any() and made.index_map is None
    assert (zero.tokens["frame"][index_M] == 0).all()
    shown = noise.tokens["frame"][index_M]
    assert abs(shown.mean()) < 0.005 and abs(shown.std() - 0.1) < 0.005
    assert torch.equal(shown, Noise("frame", 0.1)(tokens, index_M, row(0)).tokens["frame"][index_M])
    assert not torch.equal(shown, Noise("frame", 0.1)(tokens, index_M, row(1)).tokens["frame"][index_M])
    with pytest.raises(ValueError, match=r"field 'ids' must hold floating-point numbers, got torch.int64"):
        Noise("ids")(tokens, index_M, row(0))
    with pytest.raises(ValueError, match="deviation must be above 0, got 0"):
        Noise("frame", 0)
    with pytest.raises(ValueError, match="field 'few': it must have one entry a token, got 1 for 4"):
        Zero("few")(some_tokens(4, few=torch.tensor([1])), torch.tensor([1]), row(0))


def test_given_values_are_shown_one_for_each_picked_token():
    tokens, index_M = some_tokens(9), torch.tensor([2, 5])
    made = Show("ids", torch.tensor([7, 8]))(tokens, index_M, BATCH)
    assert made.tokens["ids"][index_M].tolist() == [7, 8] and not made.replaced_N.any()
    assert (made.tokens["ids"] != tokens["ids"]).sum() == 2
    with pytest.raises(ValueError, match="a value for each of 2 picked tokens, got 1 for field 'ids'"):
        Show("ids", torch.tensor([7]))(tokens, index_M, BATCH)


def test_a_swap_keeps_the_rows_tokens_and_leaves_none_in_its_place():
    tokens = Tokens.pack([some_tokens(30)] * 50 + [some_tokens(5)] * 50)
    index_M = ExactShare(role="text", share=0.4)(tokens, BATCH)
    made = Swap()(tokens, index_M, BATCH).tokens["ids"]
    row_N = torch.repeat_interleave(torch.arange(100), tokens.lengths_B)
    for b in range(100):
        assert made[row_N == b].sort().values.tolist() == tokens["ids"][row_N == b].sort().values.tolist()
    moved_N = made != tokens["ids"]
    assert per_row(index_M, tokens)[50:].tolist() == [1] * 50, "a single one stays"
    assert torch.equal(moved_N.nonzero().squeeze(1), index_M[: 50 * 11])
    one = some_tokens(12)
    alone = [Swap()(one, torch.tensor([1, 4, 9]), row(u)).tokens["ids"][[1, 4, 9]].tolist() for u in range(400)]
    assert {tuple(ids) for ids in alone} == {(104, 109, 101), (109, 101, 104)}, "both rings of three"
    assert torch.equal(Swap()(one, torch.tensor([], dtype=torch.int64), row(0)).tokens["ids"], one["ids"])


def test_shares_deal_the_picked_tokens_out():
    tokens, index_M = packed(speech(102), 500), torch.arange(51_000).view(500, 102)[:, 1:101].flatten()
    made = Shares([(0.8, Zero("frame")), (0.1, Noise("frame", 9.0))])(tokens, index_M, BATCH)
    shown, clean = made.tokens["frame"][index_M], tokens["frame"][index_M]
    zero, kept = (shown == 0).all(1).double().mean(), (shown == clean).all(1).double().mean()
    assert abs(zero - 0.8) < 0.005 and abs(kept - 0.1) < 0.005
    half = Shares([(0.5, HideAll())])(tokens, index_M, BATCH)
    assert abs(half.replaced_N.sum() / len(index_M) - 0.5) < 0.005
    with pytest.raises(ValueError, match="Shares: Drop moves tokens; it can only stand alone"):
        Shares([(0.5, Drop())])(tokens, index_M, BATCH)
    with pytest.raises(ValueError, match=r"sum of at most 1, got \[0.8, 0.3\]"):
        Shares([(0.8, HideAll()), (0.3, HideAll())])


def test_bert_replace_decides_for_whole_spans():
    cut, mask = RandomLengths((1, 2, 3)), WholeUnits(role="text", share=0.3, unit="span", past=True)
    replace = BertReplace(mask_id=7, random_ids=(500, 1500), unit="span")
    masked = kept = total = 0
    for unit in range(1_000):
        tokens = cut(some_tokens(62), row(unit))
        index_M = mask(tokens, row(unit))
        made = replace(tokens, index_M, row(unit))
        shown_M, span_M = made.tokens["ids"][index_M], tokens["span"][index_M]
        kind_M = torch.where(shown_M == 7, 0, torch.where(shown_M >= 500, 1, 2))
        same = span_M[1:] == span_M[:-1]
        assert (kind_M[1:] == kind_M[:-1])[same].all()
        masked, kept, total = masked + int((kind_M == 0).sum()), kept + int((kind_M == 2).sum()), total + len(index_M)
    assert abs(masked / total - 0.8) < 0.015 and abs(kept / total - 0.1) < 0.012
    assert len(replace(cut(some_tokens(9), row(0)), torch.tensor([], dtype=torch.int64), row(0)).tokens) == 9


def test_ernie_grams_ngram_becomes_one_mask():
    """x1 (x2 x3) x4 (x5) x6 becomes x1 [M] x4 [M] x6, in positions that count on."""
    tokens = some_tokens(8).with_values(ids=torch.tensor([1, 11, 12, 13, 14, 15, 16, 2]))
    tokens = NGrams([(12, 13)], first_id=1_000)(tokens, row(0))
    made = Collapse("ngram")(tokens, torch.tensor([2, 3, 5]), row(0))
    assert made.tokens["position"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert made.replaced_N.tolist() == [False, False, True, False, True, False, False]
    assert made.tokens["ids"][~made.replaced_N].tolist() == [1, 11, 14, 16, 2]
    assert made.index_map.tolist() == [0, 1, 2, 2, 3, 4, 5, 6]
    clean_M, seen_M = made.also["units"]
    assert tokens["ngram_id"][clean_M].tolist() == [1_000, 15] and seen_M.tolist() == [2, 4]


def test_neighbouring_units_stay_apart_and_neighbouring_tokens_without_units_become_one():
    tokens, index_M = words(2, 2, 1), torch.tensor([1, 2, 3, 4])
    assert Collapse("word")(tokens, index_M, row(0)).replaced_N.tolist() == [False, True, True, False, False]
    assert Collapse()(tokens, index_M, row(0)).replaced_N.tolist() == [False, True, False, False]
    part = Collapse("word")(words(4), torch.tensor([1, 2, 4]), row(0))
    assert part.index_map.tolist() == [0, 1, 1, 2, 3, 4], "what is not picked of a unit is kept"
    singles = Collapse("word")(words(1, 1, 1), torch.tensor([1, 3]), row(0))
    hidden = HideAll()(words(1, 1, 1), torch.tensor([1, 3]), row(0))
    assert torch.equal(singles.replaced_N, hidden.replaced_N)
    assert torch.equal(singles.tokens["ids"], hidden.tokens["ids"]), "without n-grams it is ordinary masking"


def test_inserted_tokens_stand_before_the_picked_ones_and_taking_them_out_gives_the_row_back():
    tokens, mask = words(1, 2, 1, 3), RandomTokens(role="text", rate=0.3)
    for unit in range(100):
        index_M = mask(tokens, row(unit))
        made = Insert()(tokens, index_M, row(unit))
        assert len(made.tokens) == len(tokens) + len(index_M)
        assert torch.equal(made.tokens["ids"][~made.replaced_N], tokens["ids"])
        assert torch.equal(made.tokens["ids"][made.index_map], tokens["ids"])
        assert made.tokens["position"].tolist() == list(range(len(made.tokens)))
        clean_M, seen_M = made.also["inserted"]
        assert torch.equal(clean_M, index_M) and torch.equal(seen_M + 1, made.index_map[index_M])
        assert torch.equal(made.replaced_N.nonzero().squeeze(1), seen_M)
        assert made.tokens.special_N[[0, -1]].tolist() == [0, 1] and (made.tokens.special_N[1:-1] < 0).all()


@pytest.mark.parametrize("corruption", [Drop(), Collapse(), Insert()], ids=lambda one: type(one).__name__)
def test_tokens_with_fields_of_another_length_are_not_moved(corruption):
    edges = Ragged(torch.tensor([[0, 1]]), torch.tensor([1]), refers_to="tokens")
    tokens = Tokens.of_row(torch.full((4,), -1), ids=torch.arange(4), edges=edges)
    who = type(corruption).__name__
    with pytest.raises(ValueError, match=f"{who}: every field needs one entry a token and no references, got 'edges'"):
        corruption(tokens, torch.tensor([1]), row(0))


def test_positions_on_a_grid_are_not_counted_anew():
    tokens = Tokens.of_row(torch.full((4,), -1), position=torch.zeros(4, 2))
    with pytest.raises(ValueError, match="Insert: field 'position' holds no running number; give renumber=None"):
        Insert()(tokens, torch.tensor([1]), row(0))
    assert len(Insert(renumber=None)(tokens, torch.tensor([1]), row(0)).tokens) == 5


def test_a_view_makes_picks_of_what_a_corruption_made_and_shifts_them_when_packed():
    reader = TextReader(word_tokenizer(), max_length=32)
    view = View(
        cuts={"text": RandomLengths((2,))},
        picks={"span": RandomTokens(role="text", rate=0.3, unit="span")}, corruption=Collapse("span"),
    )  # fmt: skip
    batch = some_batch(view, {"text": reader}, some_samples(9))
    units, tokens = batch.picked["span.units"], batch.picked["span"]
    assert len(batch.seen["text"]) < len(batch.clean["text"]) and 9 <= len(units) < len(tokens)
    assert batch.counts["picked:span.units"] == len(units)
    assert torch.equal(batch.replaced["text"].nonzero().squeeze(1), units.seen_M)
    assert torch.equal(tokens.seen_M.unique_consecutive(), units.seen_M)
    assert torch.isin(units.clean_M, tokens.clean_M).all()


def test_another_samples_features_are_lent_by_the_view():
    """LXMERT: of the picked regions 80 percent are zero, 10 show another picture's feature, 10 stay."""
    samples = some_samples(200)
    reader = RegionReader(features=16)
    own = [safetensors.torch.load(sample.members["regions.safetensors"])["features"] for sample in samples]
    corruption = Shares([(0.8, Zero("features")), (0.1, FromOther("features"))])
    view = View(picks={"region": RandomTokens(role="image", rate=0.5)}, corruption=corruption)
    zero = other = kept = total = 0
    for epoch in range(5):
        for i, sample in enumerate(samples):
            donor = (i + 7) % 200
            made = view.row(sample, {"image": reader}, row(i, epoch), lambda role, k: samples[donor])  # noqa: B023
            index_M = made.picked["region"].clean_M
            shown, clean = made.seen["image"]["features"][index_M], made.clean["image"]["features"][index_M]
            assert torch.equal(made.seen["image"]["box"], made.clean["image"]["box"])
            of_donor = (shown[:, None] == own[donor]).all(2).any(1)
            zero, other, total = zero + int((shown == 0).all(1).sum()), other + int(of_donor.sum()), total + len(shown)
            kept += int((shown == clean).all(1).sum())
    assert zero + other + kept == total > 1_500
    assert abs(zero / total - 0.8) < 0.03 and abs(other / total - 0.1) < 0.025
    with pytest.raises(ValueError, match="FromOther: nothing was lent; it works as the corruption of a view"):
        FromOther("features")(made.clean["image"], torch.tensor([0]), row(0))


def test_a_supplied_mask_follows_the_sample_that_the_tokens_come_from():
    samples = some_samples(3)
    picks = {(sample.key, 0): torch.tensor([1 + i]) for i, sample in enumerate(samples)}
    view = View(picks={"word": Supplied(role="text", picks=picks, source="a file")}, corruption=HideAll())
    batch = some_batch(view, {"text": TextReader(word_tokenizer(), max_length=32)}, samples)
    places = dict(zip(batch.keys, batch.clean["text"]["position"][batch.picked["word"].clean_M].tolist(), strict=True))
    assert places == {"000": 1, "001": 2, "002": 3}


def test_a_batch_is_masked_again_where_it_lies():
    reader = TextReader(word_tokenizer(), max_length=32)
    view = View(picks={"word": RandomTokens(role="text", rate=0.15)}, corruption=reader.replacement())
    batch = some_batch(view, {"text": reader}, some_samples(9))
    index_M = ExactShare(role="text", share=0.5)(batch.clean["text"], BATCH)
    again = hide(batch, "attended", "text", index_M, HideAll(), BATCH)
    assert set(again.picked) == {"attended"} and isinstance(again.picked["attended"], Picked)
    assert torch.equal(again.replaced["text"].nonzero().squeeze(1), index_M)
    assert torch.equal(again.seen["text"]["ids"], batch.clean["text"]["ids"]), "nothing is left of the first masks"
    assert again.layout is batch.layout and again.plan is batch.plan
    with pytest.raises(ValueError, match="hide: Drop moves tokens, but the batch's layout stays; use HideAll"):
        hide(batch, "word", "text", index_M, Drop(), BATCH)


def test_statistics_hold_over_a_batch_too():
    tokens = packed(some_tokens(22), ROWS)
    index_M = RandomTokens(role="text", rate=0.15)(tokens, BATCH)
    made = BertReplace(mask_id=7, random_ids=(500, 1500))(tokens, index_M, BATCH)
    shown_M = made.tokens["ids"][index_M]
    shares = [(shown_M == 7).double().mean(), (shown_M >= 500).double().mean()]
    assert abs(shares[0] - 0.8) < 0.008 and abs(shares[1] - 0.1) < 0.006
