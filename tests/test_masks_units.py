"""Masks that pick units (words, n-grams, spans), and the cuts that make them."""

import pytest
import torch
from masking import ROWS, packed, rates, row, some_tokens, words

from mmpre.draw import Draw
from mmpre.masking.random import RandomTokens
from mmpre.masking.schedule import Line
from mmpre.masking.spans import GeometricSpans, StartedSpans
from mmpre.masking.units import NGrams, RandomLengths, WholeUnits, first_of_unit
from mmpre.modalities.text import TextReader
from mmpre.tokens import Tokens

BATCH = Draw.micro_batch(0, 0, 0, 0)


def whole(index_M, tokens, unit="word"):
    """Whether the picked tokens are whole units."""
    first_N = first_of_unit(tokens, unit)
    return torch.isin(first_N, first_N[index_M]).sum() == len(index_M)


def runs(index_M):
    """Lengths of the runs of neighbouring picked tokens."""
    ends = torch.cat([(index_M.diff() > 1).nonzero().squeeze(1), torch.tensor([len(index_M) - 1])])
    return ends.diff(prepend=torch.tensor([-1]))


def test_units_are_runs_of_one_number_and_end_with_their_row():
    tokens = Tokens.pack([words(2, 1), some_tokens(4, word=torch.tensor([-1, 1, 1, -1]))])
    assert first_of_unit(tokens, "word").tolist() == [0, 1, 1, 3, 4, 5, 6, 6, 8]
    lone = some_tokens(5, special=(), word=torch.tensor([-1, -1, 3, 3, 4]))
    assert first_of_unit(lone, "word").tolist() == [0, 1, 2, 2, 4]
    between = some_tokens(5, special=(2,), word=torch.tensor([3, 3, 3, 3, 3]))
    assert first_of_unit(between, "word").tolist() == [0, 0, 2, 3, 3]
    with pytest.raises(ValueError, match="field 'few' must number the unit of each of 4 tokens, it has 1"):
        first_of_unit(some_tokens(4, few=torch.tensor([1])), "few")


def test_whole_words_are_picked_each_with_the_same_chance():
    tokens = packed(words(1, 3, 2, 1, 1, 2, 1, 4, 1, 1, 2, 1), ROWS)
    index_M = RandomTokens(role="text", rate=0.15, unit="word", at_least_one=False)(tokens, BATCH)
    assert whole(index_M, tokens)
    rate_N = torch.bincount(index_M % 22, minlength=22)[1:-1] / ROWS
    assert (rate_N - 0.15).abs().max() < 0.016
    assert abs(rate_N.mean() - 0.15) < 0.005


def test_the_text_readers_words_are_picked_whole():
    text = b"Whole words or nothing, even where words are long."
    tokens = TextReader("bytes").tokenize(_sample(text), row(0))
    for unit in range(20):
        index_M = WholeUnits(role="text", share=0.3)(tokens, row(unit))
        picked = bytes(tokens["ids"][index_M].to(torch.uint8).tolist()).decode().split()
        assert picked and set(picked) <= set(text.decode().split())


def test_whole_words_fill_the_budget_and_never_pass_it():
    tokens, mask = words(*[1, 2, 3, 4] * 10), WholeUnits(role="text", share=0.15)
    counts = []
    for unit in range(ROWS // 5):
        index_M = mask(tokens, row(unit))
        assert whole(index_M, tokens)
        counts.append(len(index_M))
    assert set(counts) == {15}
    odd = words(*[1] * 33)  # 4.95 tokens: 5 nineteen times of twenty
    counts = torch.tensor([len(mask(odd, row(unit))) for unit in range(ROWS)])
    assert set(counts.tolist()) == {4, 5}
    assert abs(counts.double().mean() / 33 - 0.15) < 0.001
    assert whole(mask(words(9, 8), row(0)), words(9, 8)), "at least one unit, however large"
    assert len(mask(words(), row(0))) == 0


def test_gpt_berts_spans_come_along_whole():
    """Spans of 1, 2 or 3 up to and past the budget: a share of 0.155 in rows of 126 at 0.15, as the authors' code."""
    mask, cut = WholeUnits(role="text", share=Line(0.30, 0.15, 100), unit="span", past=True), RandomLengths((1, 2, 3))
    picked, lengths = 0, []
    for unit in range(ROWS // 2):
        tokens = cut(some_tokens(128), row(unit))
        index_M = mask(tokens, row(unit, step=100))
        assert whole(index_M, tokens, "span") and len(index_M) >= 18
        picked += len(index_M)
        if unit < 500:
            lengths.append(tokens["span"][1:-3].bincount()[:-1])
    share = picked / 126 / (ROWS // 2)
    assert abs(share - 0.155) < 0.002
    size = torch.cat(lengths).bincount()[1:].double()
    assert (size / size.sum() - 1 / 3).abs().max() < 0.02
    early = [len(mask(cut(some_tokens(128), row(u)), row(u, step=0))) for u in range(500)]
    assert abs(sum(early) / 500 / 126 - 0.305) < 0.004


def test_random_lengths_are_drawn_anew_and_leave_special_tokens_out():
    tokens, cut = some_tokens(40), RandomLengths((1, 2, 3))
    assert torch.equal(cut(tokens, row(0))["span"], cut(tokens, row(0))["span"])
    assert not torch.equal(cut(tokens, row(0))["span"], cut(tokens, row(0, epoch=1))["span"])
    assert cut(tokens, row(0))["span"][[0, -1]].tolist() == [-1, -1]
    assert len(cut(some_tokens(2), row(0))["span"]) == 2
    with pytest.raises(ValueError, match=r"at least one length of 1 or more, got \[0, 2\]"):
        RandomLengths((0, 2))
    with pytest.raises(ValueError, match="a field 'position' already"):
        RandomLengths((1,), field="position")(tokens, row(0))


def test_ngrams_are_the_longest_that_fit_from_the_left():
    ids = torch.tensor([1, 10, 11, 12, 10, 11, 13, 10, 2])
    tokens = some_tokens(9).with_values(ids=ids)
    made = NGrams([(10, 11), (10, 11, 12), (11, 13), (10, 2)], first_id=1000)(tokens, row(0))
    assert made["ngram"].tolist() == [-1, 0, 0, 0, 1, 1, 2, 3, -1], "an n-gram never takes in a special token"
    assert made["ngram_id"].tolist() == [1, 1001, 1001, 1001, 1000, 1000, 13, 10, 2]
    assert NGrams([], first_id=1000)(tokens, row(0))["ngram_id"].tolist() == ids.tolist()
    with pytest.raises(ValueError, match=r"at least two ids, got \(4,\)"):
        NGrams([(4,)], first_id=9)


def test_geometric_spans_have_spanberts_lengths():
    mask = GeometricSpans(role="text", share=0.15)
    assert abs(float((mask.lengths_L * torch.arange(1, 11)).sum()) - 3.80) < 0.005
    tokens, lengths, shares = words(*[1] * 2_000), [], []
    for unit in range(400):
        # 100 of 2,000 words: few spans meet, and one of about 26 is cut by the budget
        index_M = GeometricSpans(role="text", share=0.05)(tokens, row(unit))
        shares.append(len(index_M) / 2_000)
        lengths.append(runs(index_M))
    assert set(shares) == {0.05}
    size = torch.cat(lengths).bincount(minlength=11)[1:11].double()
    assert (size / size.sum() - mask.lengths_L).abs().max() < 0.03
    assert max(map(max, lengths)) <= 30


def test_geometric_spans_are_whole_words_keep_the_budget_and_reach_every_word():
    tokens, mask = words(*[1, 3, 2] * 20), GeometricSpans(role="text", share=0.15)
    counts, times_N = [], torch.zeros(len(tokens))
    for unit in range(ROWS // 4):
        index_M = mask(tokens, row(unit))
        assert whole(index_M, tokens)
        counts.append(len(index_M))
        times_N[index_M] += 1
    assert max(counts) == 18 and min(counts) >= 16
    assert times_N[[0, -1]].tolist() == [0, 0] and times_N[1:-1].min() > 0
    assert whole(mask(words(30, 30), row(0)), words(30, 30))
    assert len(mask(words(), row(0))) == 0
    split = some_tokens(9, special=(0, 4, 8), word=torch.tensor([-1, 0, 1, 2, -1, 3, 4, 5, -1]))
    both = [mask(split, row(u)) for u in range(50)]
    assert all((split.special_N[index_M] < 0).all() for index_M in both)


def test_started_spans_hide_w2v_berts_0_489():
    length, mask = 120, StartedSpans(role="speech", chance=0.065, length=10, at_least=2)
    tokens = packed(some_tokens(length, special=()), ROWS)
    index_M = mask(tokens, BATCH)
    rate_N = torch.bincount(index_M % length, minlength=length) / ROWS
    assert abs(rate_N[20:].mean() - (1 - (1 - 0.065) ** 10)) < 0.005
    assert (rate_N[20:] - 0.489).abs().max() < 0.025
    assert abs(rate_N[0] - 0.065) < 0.01, "a span starts inside of its row"
    alone = rates(mask, some_tokens(length, special=()), 10_000)
    assert abs(alone[20:].mean() - 0.489) < 0.005


def test_started_spans_have_their_length_and_their_least_number():
    tokens = some_tokens(62)
    for unit in range(300):
        two = StartedSpans(role="speech", chance=1e-9, length=10, at_least=2)(tokens, row(unit))
        assert 2 <= len(two) <= 20 and len(runs(two)) <= 2
        if two[-1] < 60 and len(runs(two)) == 2:
            assert runs(two).tolist() == [10, 10]
    assert len(StartedSpans(role="speech", chance=1e-9, length=10, at_least=0)(tokens, row(0))) == 0
    assert StartedSpans(role="speech", chance=0.1, length=5, at_least=3)(some_tokens(3), row(0)).tolist() == [1]
    with pytest.raises(ValueError, match="length must be at least 1 and at_least not negative, got length 0"):
        StartedSpans(role="speech", chance=0.1, length=0)


def test_masks_of_units_over_a_budget_work_on_rows_and_say_so():
    for mask in (WholeUnits(role="text", share=0.5), GeometricSpans(role="text", share=0.5)):
        with pytest.raises(ValueError, match=f"{type(mask).__name__}: works on one row .* got a batch of 2 rows"):
            mask(packed(words(1, 2), 2), row(0))


def _sample(text):
    from mmpre.data.sample import Sample

    return Sample("a", "shard", "digest", {"txt": text})
