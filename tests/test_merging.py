"""Which tokens become one: ToMe's matching against a plain one, neighbours, windows; how often they count."""

import pytest
import torch
import torch.nn.functional as F

from mmpre.attention import Full, Plan, Window
from mmpre.attention.backends import attend
from mmpre.attention.bias import ALiBi
from mmpre.attention.rules import Band
from mmpre.layout import Layout
from mmpre.merging import (
    Merge,
    Windows,
    by_layers,
    merge_halves,
    merge_neighbours,
    most_halves,
    most_neighbours,
    spans,
)

LENGTHS = [9, 8, 8, 2, 1, 5, 0, 16]


def layout_of(lengths):
    return Layout({"it": torch.tensor(lengths, dtype=torch.int64)})


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def matrix(merge):
    """The source matrix S: True where a token of what is left (first axis) holds one from before."""
    return merge.source_N == torch.arange(merge.layout.size)[:, None]


def matched_plainly(x_tD, fewer):
    """ToMe for one row, token by token: the rows of S, each a set of tokens."""
    even, odd = range(0, len(x_tD), 2), range(1, len(x_tD), 2)
    best = []
    for a in even:
        told = [float(x_tD[a] @ x_tD[b] / (x_tD[a].norm() * x_tD[b].norm())) for b in odd]
        if told:
            best.append((max(told), a, odd[told.index(max(told))]))
    held = {token: {token} for token in range(len(x_tD))}
    for _, a, b in sorted(best, reverse=True)[:fewer]:
        held[b] |= held.pop(a)
    return [held[token] for token in sorted(held)]


def test_halves_are_matched_merged_and_unmerged_as_by_a_plain_tome():
    layout = layout_of(LENGTHS)
    x_ND = torch.randn(layout.size, 6, generator=rng(), dtype=torch.float64)
    size_N = torch.randint(1, 5, (layout.size,), generator=rng(1)).double()
    fewer_B = torch.tensor([3, 4, 1, 1, 0, 2, 0, 8])
    merge = merge_halves(x_ND, layout, fewer_B)
    assert merge.layout.lengths_B.tolist() == [n - f for n, f in zip(LENGTHS, fewer_B.tolist(), strict=True)]
    wanted_S, mean_nD, sizes = [], [], []
    for row, fewer in enumerate(fewer_B.tolist()):
        start, length = int(layout.starts_B[row]), LENGTHS[row]
        for held in matched_plainly(x_ND[start : start + length], fewer):
            place = torch.tensor(sorted(held)) + start
            source_N = torch.zeros(layout.size, dtype=torch.bool)
            source_N[place] = True
            wanted_S.append(source_N)
            mean_nD.append((x_ND[place] * size_N[place, None]).sum(0) / size_N[place].sum())
            sizes.append(size_N[place].sum())
    assert torch.equal(matrix(merge), torch.stack(wanted_S))
    assert max(int(row.sum()) for row in wanted_S) > 2, "several went into one"
    got_nD = merge.mean(x_ND, size_N)
    torch.testing.assert_close(got_nD, torch.stack(mean_nD), atol=1e-6, rtol=0)
    assert torch.equal(merge.sum(size_N), torch.stack(sizes))
    assert torch.equal(merge.back(got_nD), torch.stack(wanted_S).double().T @ got_nD)


def neighbours_plainly(similar_t, fewer):
    free, pairs = set(range(len(similar_t))), []
    for _ in range(fewer):
        open_pairs = [i for i in range(len(similar_t) - 1) if {i, i + 1} <= free]
        best = max(open_pairs, key=lambda i: float(similar_t[i]))
        pairs.append(best)
        free -= {best, best + 1}
    return pairs


def test_the_best_pairs_of_neighbours_are_taken_one_after_the_other():
    layout = layout_of(LENGTHS)
    for seed in range(20):
        similar_N = torch.rand(layout.size, generator=rng(seed), dtype=torch.float64)
        fewer_B = (most_neighbours(layout.lengths_B) * torch.rand(len(LENGTHS), generator=rng(seed))).round().long()
        merge, gate_N = merge_neighbours(similar_N, layout, fewer_B)
        right = torch.zeros(layout.size, dtype=torch.int64)
        for row, fewer in enumerate(fewer_B.tolist()):
            start = int(layout.starts_B[row])
            for pair in neighbours_plainly(similar_N[start : start + LENGTHS[row]], fewer):
                right[start + pair + 1] = 1
        assert torch.equal(merge.source_N, (1 - right).cumsum(0) - 1)
        assert torch.equal(gate_N, torch.ones_like(gate_N))
        assert torch.equal(merge.layout.lengths_B, layout.lengths_B - fewer_B)


def test_sources_stay_sources_through_any_merges():
    layout = layout_of(LENGTHS)
    x_ND = torch.randn(layout.size, 4, generator=rng(), dtype=torch.float64)
    merge, size_n, now = Merge.none(layout), torch.ones(layout.size, dtype=torch.float64), layout
    for step in range(4):
        here_nD = torch.randn(now.size, 4, generator=rng(step), dtype=torch.float64)
        if step < 2:
            similar_n = torch.rand(now.size, generator=rng(step))
            one, _ = merge_neighbours(similar_n, now, most_neighbours(now.lengths_B))
        else:
            one = merge_halves(here_nD, now, most_halves(now.lengths_B))
        before_S = matrix(merge)
        merge, size_n, now = merge.then(one), one.sum(size_n), one.layout
        s_nN = matrix(merge)
        assert torch.equal(s_nN, (matrix(one).double() @ before_S.double()).bool()), "S' S is the whole merge"
        assert (s_nN.sum(0) == 1).all() and torch.equal(s_nN.sum(1).double(), size_n)
        assert size_n.sum() == layout.size and now.size == len(size_n)
        assert torch.equal(now.row_N[merge.source_N], layout.row_N), "rows keep to themselves"
        if step < 2:
            assert (merge.source_N.diff() >= 0).all(), "neighbours keep their order"
        assert torch.equal(merge.first(torch.arange(layout.size)), s_nN.int().argmax(1))
        alike_ND = merge.back(merge.mean(x_ND, torch.ones(layout.size)))  # now all of a group are equal
        again_ND = merge.back(merge.mean(alike_ND, torch.rand(layout.size, generator=rng(9)) + 0.1))
        torch.testing.assert_close(again_ND, alike_ND, atol=1e-12, rtol=0)
    assert now.size < layout.size // 3


def test_the_gate_teaches_what_made_the_similarities():
    layout = layout_of([8, 5])
    x_ND = torch.randn(13, 4, generator=rng(), dtype=torch.float64)
    similar_N = torch.rand(13, generator=rng(1), dtype=torch.float64).requires_grad_()
    merge, gate_N = merge_neighbours(similar_N, layout, torch.tensor([2, 1]))
    target_nD = torch.randn(10, 4, generator=rng(2), dtype=torch.float64)
    (merge.mean(x_ND, gate_N) * target_nD).sum().backward()
    assert similar_N.grad.isfinite().all() and (similar_N.grad[:4].abs() > 0).any()
    assert similar_N.grad[7] == 0 and similar_N.grad[12] == 0, "a row's last token has no right neighbour"
    # the first choice of a row is a softmax: together its gradients are nought where it was the only one
    assert similar_N.grad[8:12].sum().abs() < 1e-12


def test_too_many_merges_at_once_are_refused():
    layout, similar_N = layout_of([9, 4]), torch.rand(13)
    with pytest.raises(ValueError, match=r"of 4 tokens at most 1 can surely be merged with a neighbour at once, got 2"):
        merge_neighbours(similar_N, layout, torch.tensor([3, 2]))
    with pytest.raises(ValueError, match=r"at most half of a row's tokens can go at once, got 5 of 9; merge fewer"):
        merge_halves(torch.rand(13, 2), layout, torch.tensor([5, 0]))
    with pytest.raises(ValueError, match=r"2 layers cannot bring 16 tokens to 5, only to 7; give it more layers"):
        by_layers(torch.tensor([16]), torch.tensor([5]), 2, most_neighbours)


def test_layers_reach_every_goal_that_the_paper_asks_for():
    size_W, goal_W = (
        torch.tensor([[n, g] for n in range(1, 17) for g in range(max(1, int(0.4 * n)), n + 1)]).unbind(1)
    )  # fmt: skip
    for layers in (3, 4):
        fewer = by_layers(size_W, goal_W, layers, most_neighbours)
        assert torch.equal(size_W - sum(fewer), goal_W) and len(fewer) == layers
    sixteen = by_layers(torch.tensor([16]), torch.tensor([8]), 4, most_neighbours)
    assert [int(one) for one in sixteen] == [2, 2, 2, 2]


@pytest.mark.parametrize("share", [0.4, 0.47, 0.5, 1.0])
def test_windows_are_cut_in_rows_and_come_back(share):
    layout = layout_of([40, 0, 16, 1, 35, 48])
    cut = Windows.of(layout, 16, share)
    assert cut.layout.lengths_B.tolist() == sorted([16, 16, 8, 16, 1, 16, 16, 3, 16, 16, 16])
    assert len(cut.layout.groups) <= 6, "those of equal sizes lie together"
    x_N = torch.arange(layout.size)
    assert torch.equal(x_N[cut.place_N][cut.back_N], x_N)
    start_N = torch.repeat_interleave(layout.starts_B, layout.lengths_B)
    assert torch.equal((x_N - start_N)[cut.place_N], cut.position_N)
    for start, length in zip(cut.layout.starts_B.tolist(), cut.layout.lengths_B.tolist(), strict=True):
        places = cut.place_N[start : start + length]
        assert (places.diff() == 1).all() and int(cut.position_N[start]) % 16 == 0
        assert len(set(layout.row_N[places].tolist())) == 1
    fewer_W = by_layers(cut.layout.lengths_B, cut.goal_W, 4, most_neighbours)
    merge, now = Merge.none(cut.layout), cut.layout
    for one in fewer_W:
        step, _ = merge_neighbours(torch.rand(now.size, generator=rng()), now, one)
        merge, now = merge.then(step), step.layout
    whole, place_n = cut.together(merge)
    left = whole.layout.lengths_B
    assert ((left - (layout.lengths_B * share)).abs() <= 1).all() and left[1] == 0
    assert (whole.source_N.diff() >= 0).all() and torch.equal(whole.layout.row_N[whole.source_N], layout.row_N)
    size_n = merge.sum(torch.ones(layout.size))[place_n]
    assert torch.equal(size_n, whole.sum(torch.ones(layout.size)))


def test_spans_count_on_from_their_starts():
    assert spans(torch.tensor([7, 0, 4]), torch.tensor([2, 0, 3])).tolist() == [7, 8, 4, 5, 6]


@pytest.mark.parametrize("backend", ["groups", "dense", "flex"])
@pytest.mark.parametrize("bias", [None, ALiBi(2)], ids=["", "alibi"])
def test_a_token_that_counts_three_times_is_read_as_three_equal_ones(backend, bias, monkeypatch):
    monkeypatch.setenv("MMPRE_ATTENTION", backend)
    lengths, count_M = [4, 3, 3], torch.tensor([1.0, 3, 2, 1, 1, 1, 2, 5, 1, 1])
    qkv = torch.randn(10, 3, 2, 8, generator=rng())
    position_N = torch.tensor([0, 2, 5, 6, 0, 1, 2, 0, 4, 7])
    plan = Plan(layout_of(lengths), given_N=position_N, counts_M=count_M)
    got = attend(*qkv.unbind(1), plan, bias=bias)
    source_N = torch.repeat_interleave(torch.arange(10), count_M.long())
    long = torch.zeros(3, dtype=torch.int64).index_add(0, plan.layout.row_N, count_M.long())
    monkeypatch.setenv("MMPRE_ATTENTION", "dense")
    repeated = Plan(layout_of(long.tolist()), given_N=position_N[source_N])
    wanted = attend(*qkv[source_N].unbind(1), repeated, bias=bias)
    first_N = torch.tensor([int((source_N == i).int().argmax()) for i in range(10)])
    torch.testing.assert_close(got, wanted[first_N], atol=2e-6, rtol=0)


def test_counts_go_with_windows_dropout_and_roles():
    layout = Layout({"a": torch.tensor([3, 2]), "b": torch.tensor([2, 1])})
    count_N = torch.tensor([1.0, 2, 3, 1, 4, 2, 1, 5])
    plan = Plan(layout, Band(2, 2), counts_M=count_N)
    assert plan.only("a", layout).counts_M.tolist() == [1, 2, 3, 2, 1]
    assert torch.equal(plan.also(Window(1)).counts_M, count_N)
    qkv = torch.randn(8, 3, 2, 8, generator=rng())
    dense = torch.einsum("hnm,mhk->nhk", _by_hand(qkv, plan, layout), qkv[:, 2])
    torch.testing.assert_close(attend(*qkv.unbind(1), plan), dense, atol=2e-6, rtol=0)
    half = attend(*qkv.bfloat16().unbind(1), plan)
    torch.testing.assert_close(half.float(), dense, atol=3e-2, rtol=0)


def _by_hand(qkv, plan, layout):
    score_HNN = torch.einsum("nhk,mhk->hnm", qkv[:, 0], qkv[:, 1]) / 8**0.5 + plan.counts_M.log()
    apart = (torch.arange(8)[:, None] - torch.arange(8)).abs()
    allowed = (layout.row_N[:, None] == layout.row_N) & (apart <= 2)
    return F.softmax(score_HNN.masked_fill(~allowed, -torch.inf), -1)


def test_kernels_that_know_no_counts_say_so(monkeypatch):
    plan = Plan(layout_of([4]), counts_M=torch.ones(4))
    q = torch.randn(4, 1, 8, dtype=torch.bfloat16)
    monkeypatch.setenv("MMPRE_ATTENTION", "varlen")
    with pytest.raises(ValueError, match="varlen attention: is full or causal and has no bias, got merged tokens that"):
        attend(q, q, q, plan)
    assert Full().plan(layout_of([4])).crowds == [None]
