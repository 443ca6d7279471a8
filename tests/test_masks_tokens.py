"""Masks over single tokens: exact shares, weights, schedules, mixtures, files, and many rows at once."""

import json
import pickle

import pytest
import safetensors.torch
import torch
from masking import ROWS, clip, packed, per_row, rates, row, some_tokens, words

from mmpre.data.sample import Sample
from mmpre.draw import Draw
from mmpre.layout import Layout
from mmpre.masking.exact import ExactShare
from mmpre.masking.grid import Blocks, Tube
from mmpre.masking.mixture import Mixture
from mmpre.masking.random import RandomTokens
from mmpre.masking.rows import lowest
from mmpre.masking.schedule import Line
from mmpre.masking.spans import StartedSpans
from mmpre.masking.supplied import Supplied, SuppliedError
from mmpre.masking.weighted import Weighted, draw_weighted
from mmpre.tokens import Tokens

BATCH = Draw.micro_batch(0, 0, 0, 0)


def test_an_exact_share_is_exact_in_each_row_and_every_token_as_likely():
    tokens = packed(some_tokens(22), ROWS)
    index_M = ExactShare(role="text", share=0.15)(tokens, BATCH)
    assert (per_row(index_M, tokens) == 3).all()
    rate_N = torch.bincount(index_M % 22, minlength=22) / ROWS
    assert rate_N[[0, -1]].tolist() == [0, 0]
    assert (rate_N[1:-1] - 0.15).abs().max() < 4.5 * (0.15 * 0.85 / ROWS) ** 0.5


def test_pairs_are_picked_as_often_as_chance_says_so_choices_are_uniform():
    tokens = packed(some_tokens(5, special=()), ROWS)
    index_M = ExactShare(role="text", share=0.4)(tokens, BATCH) % 5
    pair = index_M.view(ROWS, 2)
    times = torch.bincount(pair[:, 0] * 5 + pair[:, 1], minlength=25)
    assert (times > 0).sum() == 10
    chi2 = ((times[times > 0] - ROWS / 10) ** 2 / (ROWS / 10)).sum()
    assert chi2 < 27.9  # 9 degrees of freedom, p = 0.001


@pytest.mark.parametrize("length, count", [(1, 1), (2, 1), (3, 1), (7, 1), (100, 15)])
def test_an_exact_share_takes_at_least_one_and_leaves_one(length, count):
    mask = ExactShare(role="text", share=0.15)
    assert len(mask(some_tokens(length, special=()), row(0))) == count
    assert len(ExactShare(role="text", share=0.99)(some_tokens(length, special=()), row(0))) == max(1, length - 1)
    assert len(mask(some_tokens(2), row(0))) == len(mask(some_tokens(0, special=()), row(0))) == 0


@pytest.mark.parametrize(
    "mask",
    [
        RandomTokens(role="text", rate=0.15),
        RandomTokens(role="text", rate=0.15, unit="word"),
        ExactShare(role="text", share=0.3),
        StartedSpans(role="text", chance=0.1, length=3, at_least=2),
        Weighted(role="text", share=0.3, weights=lambda tokens: tokens["ids"].double()),
    ],
    ids=lambda mask: type(mask).__name__,
)
def test_a_batch_is_picked_like_its_rows(mask):
    """Ragged rows: each row of the batch gets what a row alone gets, in number and in chance."""
    kinds = [words(1, 2, 3, 1, 1, 2), words(2), words(3, 3, 1, 1, 1, 1, 1, 1, 1, 1), words()]
    alone = mask(kinds[0], row(7))
    assert torch.equal(alone, mask(Tokens.pack(kinds[:1]), row(7))), "a row is a batch of one row"
    batch = Tokens.pack(kinds * 2_500)
    index_M = mask(batch, BATCH)
    assert (index_M.diff() > 0).all() and (batch.special_N[index_M] < 0).all()
    counts = per_row(index_M, batch).view(-1, 4)
    assert counts[:, 3].sum() == 0
    assert counts[:, :3].min() >= 1
    period = sum(len(kind) for kind in kinds)
    together_N = torch.bincount(index_M % period, minlength=period) / 2_500
    start = 0
    for kind in kinds[:3]:
        alone_N = rates(mask, kind, 2_500)
        assert (together_N[start : start + len(kind)] - alone_N).abs().max() < 0.05
        start += len(kind)


def test_what_a_row_loses_does_not_depend_on_other_rows():
    tokens, mask = some_tokens(40), ExactShare(role="text", share=0.3)
    assert torch.equal(mask(tokens, row(1)), mask(tokens, row(1)))
    assert not torch.equal(mask(tokens, row(1)), mask(tokens, row(2)))


def test_no_token_at_all_may_be_picked_where_a_paper_allows_it():
    tokens = packed(some_tokens(5), ROWS)
    index_M = RandomTokens(role="text", rate=0.15, at_least_one=False)(tokens, BATCH)
    counts = per_row(index_M, tokens)
    assert abs((counts == 0).double().mean() - 0.85**3) < 0.02
    assert abs(counts.double().mean() / 3 - 0.15) < 0.005


def test_weights_decide_who_is_drawn_without_replacement():
    """MergeDNA: groups of 1, 2 and 4 at 1/g^2: one draw follows the weights (chi-square on 100,000 rows)."""
    group_N = torch.tensor([1, 2, 2, 4, 4, 4, 4])
    weight_N, rows = (1 / group_N.double() ** 2).repeat(100_000), 100_000
    tokens = packed(some_tokens(7, special=()), rows)
    index_M = draw_weighted(weight_N, tokens.lengths_B, torch.ones(rows, dtype=torch.int64), BATCH)
    times_N = torch.bincount(index_M % 7, minlength=7)
    expected_N = rows * weight_N[:7] / weight_N[:7].sum()
    assert ((times_N - expected_N) ** 2 / expected_N).sum() < 22.5  # 6 degrees of freedom, p = 0.001


def test_draws_without_replacement_equal_those_one_after_the_other():
    weight_N, rows = torch.tensor([4.0, 2.0, 1.0, 1.0]), 100_000
    tokens = packed(some_tokens(4, special=()), rows)
    index_M = draw_weighted(weight_N.repeat(rows), tokens.lengths_B, torch.full((rows,), 2), BATCH)
    assert (per_row(index_M, tokens) == 2).all()
    one_by_one_N = torch.bincount(torch.multinomial(weight_N.expand(rows, 4), 2).flatten(), minlength=4)
    assert (torch.bincount(index_M % 4, minlength=4) - one_by_one_N).abs().max() / rows < 0.01


def test_two_roles_of_a_row_are_drawn_jointly_and_no_device_is_waited_for():
    layout = Layout({"video": torch.tensor([5, 2]), "text": torch.tensor([3, 4])})
    weight_N = torch.zeros(14).index_fill(0, layout.index["text"], 1.0)
    index_M = draw_weighted(weight_N, layout.lengths_B, torch.tensor([3, 2]), BATCH)
    assert torch.isin(index_M, layout.index["text"]).all()
    assert layout.row_N[index_M].tolist() == [0, 0, 0, 1, 1]
    # tensors without values: asking one for its content is an error
    unknown = lowest(torch.rand(14, device="meta"), layout.lengths_B, torch.tensor([3, 2]))
    assert unknown.shape == (5,) and unknown.device.type == "meta"


def test_weighted_rows_have_their_own_counts_and_weights_of_zero_are_never_picked():
    tokens = Tokens.pack([some_tokens(12), some_tokens(22)])
    weights = (torch.arange(34) % 2).float()
    mask = Weighted(role="text", share=0.3, weights=lambda tokens: weights)
    for unit in range(50):
        index_M = mask(tokens, row(unit))
        assert per_row(index_M, tokens).tolist() == [3, 6]
        assert (weights[index_M] == 1).all() and (tokens.special_N[index_M] < 0).all()
    few = Weighted(role="text", share=0.9, weights=lambda tokens: weights)(tokens, row(0))
    assert len(few) == int((weights * (tokens.special_N < 0)).sum()), "no more than have a weight"


def test_the_rate_follows_the_step_in_a_straight_line():
    line, tokens = Line(0.30, 0.15, 100), packed(some_tokens(102), 1_000)
    for step, rate in [(0, 0.30), (50, 0.225), (100, 0.15), (900, 0.15)]:
        assert line(step) == pytest.approx(rate)
        index_M = RandomTokens(role="text", rate=line)(tokens, row(0, step=step))
        assert abs(len(index_M) / 100_000 - rate) < 0.005
        assert len(ExactShare(role="text", share=line)(some_tokens(202), row(0, step=step))) == round(200 * rate)
    assert pickle.loads(pickle.dumps(line)) == line
    with pytest.raises(ValueError, match="ExactShare at step 7: share must lie between 0 and 1, got 7"):
        ExactShare(role="text", share=lambda step: step)(some_tokens(9), row(0, step=7))
    with pytest.raises(ValueError, match="Line: end must lie between 0 and 1, got 15"):
        Line(0.3, 15, 100)


def test_a_mixture_draws_its_mask_by_share_and_alike_for_all_roles():
    def parts(role):
        return [(0.5, ExactShare(role=role, share=0.5)), (0.25, ExactShare(role=role, share=0.1)), (0.25, None)]

    text, image = Mixture(role="text", parts=parts("text")), Mixture(role="image", parts=parts("image"))
    tokens, counts, alike = some_tokens(12), [], 0
    for unit in range(10_000):
        counts.append(len(text(tokens, row(unit).child("pick", "word"))))
        alike += counts[-1] == len(image(tokens, row(unit).child("pick", "patch")))
    assert alike == 10_000
    shares = torch.bincount(torch.tensor(counts), minlength=6) / 10_000
    assert (shares[[5, 1, 0]] - torch.tensor([0.5, 0.25, 0.25])).abs().max() < 0.02
    with pytest.raises(ValueError, match=r"sum to 1, got \[0.5\]"):
        Mixture(role="text", parts=[(0.5, None)])
    with pytest.raises(ValueError, match="the role 'text', got image"):
        Mixture(role="text", parts=[(1.0, ExactShare(role="image", share=0.5))])


def test_masks_come_from_a_file_by_key_and_window(tmp_path):
    lines = [{"key": "a/b", "index": [3, 1]}, {"key": "a/b", "window": 1, "index": [2]}, {"key": "c", "index": []}]
    (tmp_path / "hard.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    tensors = {"a/b": torch.tensor([3, 1]), "a/b#1": torch.tensor([2], dtype=torch.int32), "c": torch.empty(0).long()}
    safetensors.torch.save_file(tensors, tmp_path / "hard.safetensors")
    tokens = some_tokens(6)
    for name in ("hard.jsonl", "hard.safetensors"):
        mask = Supplied.from_file(tmp_path / name, role="text")
        assert mask.of(sample("a/b"))(tokens, row(0)).tolist() == [1, 3]
        assert mask.of(sample("a/b", 1))(tokens, row(0)).tolist() == [2]
        assert mask.of(sample("c"))(tokens, row(0)).tolist() == []
        with pytest.raises(SuppliedError, match="no mask for window 0 of sample 'other'; make one"):
            mask.of(sample("other"))
        other = ExactShare(role="text", share=0.5)
        filled = Supplied.from_file(tmp_path / name, role="text", otherwise=other)
        assert filled.of(sample("c")) is filled.of(sample("other")) is other


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("m.jsonl", b'{"key": "a", "index": [1, 2', "line 1: "),
        ("m.jsonl", b'{"key": "a", "index": [true]}', "line 1: wanted"),
        ("m.jsonl", b'{"key": "a", "index": [-1]}', "line 1: wanted"),
        (
            "m.jsonl",
            b'{"key": "a", "index": [1]}\n{"key": "a", "index": [2]}',
            "line 2: window 0 of 'a' is there twice",
        ),
        ("m.safetensors", b"\x80\x04K\x01.", "is no safetensors file"),
        ("m.pkl", b"\x80\x04K\x01.", "wanted a .jsonl or .safetensors file"),
    ],
)
def test_a_file_of_masks_that_cannot_be_used_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SuppliedError, match=message):
        Supplied.from_file(tmp_path / name, role="text")


def test_a_supplied_mask_that_does_not_fit_the_row_is_refused(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"key": "long", "index": [1, 9]}\n{"key": "cls", "index": [0, 2]}\n')
    mask = Supplied.from_file(tmp_path / "m.jsonl", role="text")
    with pytest.raises(
        SuppliedError, match=r"sample 'long': wanted tokens 0 to 5, got \[1, 9\]; it was made with anot"
    ):
        mask.of(sample("long"))(some_tokens(6), row(0))
    with pytest.raises(SuppliedError, match=r"tokens \[0\] are special and never picked"):
        mask.of(sample("cls"))(some_tokens(6), row(0))
    with pytest.raises(SuppliedError, match="cannot be read"):
        Supplied.from_file(tmp_path / "none.safetensors", role="text")


def test_masks_are_picklable():
    masks = [
        RandomTokens(role="text", rate=Line(0.3, 0.15, 10), unit="word"), Blocks(role="video"),
        Tube(role="video", inside=ExactShare(role="video", share=0.5)),
        Supplied(role="text", picks={("a", 0): torch.tensor([1])}, source="a file").of(sample("a")),
    ]  # fmt: skip
    for mask in masks:
        tokens = clip(2, 3, 3) if mask.role == "video" else words(1, 2, 1)
        assert torch.equal(pickle.loads(pickle.dumps(mask))(tokens, row(3)), mask(tokens, row(3)))


def sample(key, window=0):
    return Sample(key, "shard", "digest", {}, window)
