import pytest
import torch

from mmpre.draw import Draw
from mmpre.masking.corrupt import BertReplace, HideAll
from mmpre.masking.random import RandomTokens
from mmpre.tokens import Tokens

ROWS = 10_000


def row(unit, epoch=0):
    return Draw.row(3, 0, 0, epoch=epoch, unit=unit)


def some_tokens(length, special=(0, -1)):
    """Ids 100 to 199, with CLS at one place and SEP at another."""
    special_N = torch.full((length,), -1)
    for kind, place in enumerate(special):
        special_N[place] = kind
    return Tokens.of_row(special_N, ids=100 + torch.arange(length) % 100)


def test_random_tokens_pick_their_share_evenly_and_never_a_special_token():
    tokens, mask = some_tokens(130), RandomTokens(role="text", rate=0.15)
    times_N = torch.zeros(130)
    for unit in range(ROWS):
        index_M = mask(tokens, row(unit))
        assert (index_M.diff() > 0).all()
        times_N[index_M] += 1
    assert times_N[0] == times_N[-1] == 0
    rates_N = times_N[1:-1] / ROWS
    assert abs(rates_N.mean() - 0.15) < 0.001
    assert (rates_N - 0.15).abs().max() < 4.5 * (0.15 * 0.85 / ROWS) ** 0.5


def test_a_short_row_loses_at_least_one_token_and_each_is_as_likely():
    tokens, mask = some_tokens(5), RandomTokens(role="text", rate=0.15)
    picks = [mask(tokens, row(unit)) for unit in range(ROWS)]
    assert min(len(index_M) for index_M in picks) == 1
    times_N = torch.bincount(torch.cat(picks), minlength=5)
    # P(picked) = 0.15 + P(none of three) / 3
    assert (times_N[1:4] / ROWS - (0.15 + 0.85**3 / 3)).abs().max() < 0.025
    assert times_N[[0, 4]].tolist() == [0, 0]


def test_a_row_without_ordinary_tokens_loses_none():
    mask = RandomTokens(role="text", rate=0.15)
    assert len(mask(some_tokens(2), row(0))) == 0
    assert len(mask(some_tokens(0, special=()), row(0))) == 0


def test_the_same_row_and_epoch_are_masked_alike_and_other_epochs_differ():
    tokens, mask = some_tokens(300), RandomTokens(role="text", rate=0.15)
    assert torch.equal(mask(tokens, row(1)), mask(tokens, row(1)))
    assert not torch.equal(mask(tokens, row(1)), mask(tokens, row(1, epoch=1)))


@pytest.mark.parametrize("rate", [0.0, 1.0, 15.0])
def test_an_impossible_rate_is_refused_by_its_value(rate):
    with pytest.raises(ValueError, match=f"rate must lie between 0 and 1, got {rate}"):
        RandomTokens(role="text", rate=rate)


def test_bert_replace_masks_80_changes_10_and_keeps_10_percent():
    tokens = some_tokens(102)
    index_M = torch.arange(1, 101, 5)
    replace = BertReplace(mask_id=7, random_ids=(500, 1500))
    masked = changed = kept = 0
    seen_ids = []
    for unit in range(ROWS):
        made = replace(tokens, index_M, row(unit))
        shown_M, clean_M = made.tokens["ids"][index_M], tokens["ids"][index_M]
        assert torch.equal(made.replaced_N[index_M], shown_M == 7)
        masked += int((shown_M == 7).sum())
        kept += int((shown_M == clean_M).sum())
        random_M = shown_M[(shown_M >= 500) & (shown_M < 1500)]
        changed += len(random_M)
        seen_ids.append(random_M)
        other_N = torch.ones(102, dtype=torch.bool)
        other_N[index_M] = False
        assert torch.equal(made.tokens["ids"][other_N], tokens["ids"][other_N])
        assert not made.replaced_N[other_N].any()
    total = ROWS * len(index_M)
    assert masked + changed + kept == total
    assert abs(masked / total - 0.8) < 0.004
    assert abs(changed / total - 0.1) < 0.003
    ids = torch.cat(seen_ids)
    assert ids.min() == 500 and ids.max() == 1499 and abs(ids.float().mean() - 999.5) < 10
    assert tokens["ids"].max() < 200, "the clean tokens must stay as they are"


def test_what_a_random_replacement_shows_does_not_depend_on_the_hidden_id():
    tokens, replace = some_tokens(300), BertReplace(mask_id=7, random_ids=(500, 1500), mask=0.5, random=0.5)
    index_M = torch.arange(1, 299)
    other = tokens.with_values(ids=tokens["ids"].flip(0))
    shown = replace(tokens, index_M, row(0)).tokens["ids"][index_M]
    assert torch.equal(shown, replace(other, index_M, row(0)).tokens["ids"][index_M])


def test_hide_all_marks_exactly_the_picked_ones_and_changes_nothing():
    tokens, index_M = some_tokens(9), torch.tensor([2, 5])
    made = HideAll()(tokens, index_M, row(0))
    assert made.replaced_N.nonzero().squeeze(1).tolist() == [2, 5]
    assert made.index_map is None
    assert torch.equal(made.tokens["ids"], tokens["ids"])


@pytest.mark.parametrize("shares", [dict(mask=0.8, random=0.3), dict(mask=-0.1)])
def test_shares_that_make_no_sense_are_refused(shares):
    with pytest.raises(ValueError, match="BertReplace: mask and random are shares"):
        BertReplace(mask_id=0, random_ids=(1, 2), **shares)
    with pytest.raises(ValueError, match=r"random_ids must be \(first, last \+ 1\), got \(5, 5\)"):
        BertReplace(mask_id=0, random_ids=(5, 5))
