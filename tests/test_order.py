"""The data order: every unit once an epoch, from the arguments alone, and the same for ever."""

import numpy as np
import pytest

from mmpre.data.order import Order, deal, donor, permute

# Frozen: a change of any of these gives every stored run another data order.
PERMUTE_10 = [4, 9, 8, 0, 7, 5, 3, 1, 6, 2]
PERMUTE_BIG = [211771125, 132644721, 284348906, 709348590]
PERMUTE_HUGE = [738035778505149856, 199236010643430290]
ORDER_20 = [
    5, 4, 9, 8, 1, 0, 6, 10, 12, 7, 13, 11, 18, 16, 17, 19, 3, 2, 15, 14,
    16, 17, 12, 13, 0, 1, 18, 9, 14, 15, 19, 8, 2, 6, 11, 3, 7, 10, 4, 5,
]  # fmt: skip
ORDER_BIG = [505530627, 715857815, 718905004, 275636991, 127659656, 273760372]
DONORS = [977186411, 669084858, 6410122]

COUNTS = [*range(1, 70), 100, 127, 128, 129, 1000, 4097, 99_991]


@pytest.mark.parametrize("key", [0, 1, -3, 2**63, 2**80 + 1])
def test_permute_is_one_to_one_for_every_count(key):
    for count in COUNTS:
        assert (np.sort(permute(np.arange(count), count, key)) == np.arange(count)).all(), count


def test_permute_is_frozen():
    assert permute(np.arange(10), 10, 1).tolist() == PERMUTE_10
    assert permute(np.array([0, 1, 2, 10**9 - 1]), 10**9, 12345).tolist() == PERMUTE_BIG
    assert permute(np.array([0, 2**60 - 1]), 2**60, 7).tolist() == PERMUTE_HUGE


def test_permute_takes_each_index_by_itself():
    index = np.random.default_rng(0).integers(0, 10**6, 500)
    whole = permute(index, 10**6, 5)
    assert whole.tolist() == [int(permute(np.array([i]), 10**6, 5)[0]) for i in index]
    assert permute(np.array([], dtype=np.int64), 5, 1).tolist() == []


def test_permute_sends_every_index_anywhere_about_as_often():
    keys = 2000
    for count in (2, 5, 12):
        hits = np.zeros((count, count))
        for key in range(keys):
            hits[np.arange(count), permute(np.arange(count), count, key)] += 1
        expected = keys / count
        chi2 = ((hits - expected) ** 2 / expected).sum(1)
        assert (chi2 < count - 1 + 6 * np.sqrt(2 * count)).all(), (count, chi2)


def test_permute_leaves_no_neighbours_together():
    count = 100_000
    moved = permute(np.arange(count), count, 9)
    assert abs(np.corrcoef(np.arange(count), moved)[0, 1]) < 0.02
    assert abs(np.abs(np.diff(moved)).mean() / count - 1 / 3) < 0.01


@pytest.mark.parametrize("index", [-1, 5])
def test_permute_refuses_an_index_outside(index):
    with pytest.raises(ValueError, match=rf"indices must lie in \[0, 5\), got {index}"):
        permute(np.array([index]), 5, 0)


@pytest.mark.parametrize(("block", "window"), [(1, 1), (8, 4096), (3, 2), (7, 5), (1, 10**9), (1000, 1)])
def test_every_epoch_holds_every_unit_once(block, window):
    for count in (*range(1, 40), 100, 1009):
        order = Order(count, 5, block, window)
        units = order.units(np.arange(3 * count)).reshape(3, count)
        assert (np.sort(units, 1) == np.arange(count)).all(), count
        assert [order.epoch(p) for p in (0, count - 1, count, 3 * count - 1)] == [0, 0, 1, 2]
        if count >= 39:
            assert (units[0] != units[1]).any() and (units[1] != units[2]).any()


def test_the_order_is_frozen():
    assert Order(20, 1, block=2, window=3).units(np.arange(40)).tolist() == ORDER_20
    positions = np.array([0, 1, 2, 10**9 - 1, 10**9, 10**12])
    assert Order(10**9, 77).units(positions).tolist() == ORDER_BIG


def test_a_unit_depends_on_its_position_alone():
    order = Order(1009, 3, block=4, window=16)
    positions = np.random.default_rng(0).permutation(4 * 1009)
    whole = order.units(np.arange(4 * 1009))
    assert (order.units(positions) == whole[positions]).all()
    for start in (0, 1, 500, 1008, 1009, 2500):  # resuming is to ask for later positions
        assert (
            Order(1009, 3, block=4, window=16).units(np.arange(start, start + 100)) == whole[start : start + 100]
        ).all()
    np.random.seed(1)
    assert (order.units(np.arange(50)) == whole[:50]).all()


def test_another_seed_gives_another_order():
    orders = [Order(10_000, seed).units(np.arange(10_000)) for seed in (1, 2, -1, 2**63 - 1)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.001


def test_reads_stay_in_blocks_within_a_window():
    count, block, window = 100_000, 10, 20
    order = Order(count, 4, block, window)
    units = order.units(np.arange(count))
    for start in range(0, count - block * window, block * window):
        runs = (np.diff(np.sort(units[start : start + block * window])) != 1).sum() + 1
        assert runs <= window + 1  # 200 rows read 20 runs of 10 (or one more, cut by the end), not 200 single places
    assert abs(np.corrcoef(np.arange(count), units)[0, 1]) < 0.05


def test_which_units_stand_last_changes_from_epoch_to_epoch():
    order = Order(1001, 8, block=10, window=2)
    last = [tuple(sorted(order.units(np.arange(e * 1001 + 1000, e * 1001 + 1001)).tolist())) for e in range(20)]
    assert len(set(last)) > 15


def test_the_order_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match=r"count must lie between 1 and 2\^60, got 0"):
        Order(0, 1)
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        Order(5, 1, block=0)
    with pytest.raises(ValueError, match="positions count from 0, got -1"):
        Order(5, 1).units(np.array([-1]))


def test_a_donor_is_another_unit_and_uniform_over_the_others():
    count, rows = 7, 7000
    for own in range(count):
        donors = [donor(position, count, 3, "image0", own=own) for position in range(rows)]
        hits = np.bincount(donors, minlength=count)
        assert hits[own] == 0
        others = np.delete(hits, own)
        assert ((others - rows / 6) ** 2 / (rows / 6)).sum() < 25  # chi square, 5 degrees of freedom
    assert {donor(position, 2, 0, "x", own=1) for position in range(50)} == {0}


def test_donors_are_frozen_and_differ_by_position_purpose_and_seed():
    assert [donor(p, 10**9, 3, "image0", own=5) for p in range(3)] == DONORS
    assert len({donor(p, 10**9, s, q, own=5) for p in (0, 1) for s in (3, 4) for q in ("a", "b", 0)}) == 12


def test_a_donor_needs_another_unit():
    with pytest.raises(ValueError, match="another unit than 0 among 1 units"):
        donor(0, 1, 0, "x", own=0)


def test_rows_are_dealt_evenly_by_their_lengths():
    lengths = np.random.default_rng(0).integers(5, 512, 256)
    for parts in (1, 2, 3, 8):
        dealt = deal(lengths, parts)
        assert sorted(np.concatenate(dealt).tolist()) == list(range(256))
        assert all((np.diff(part) > 0).all() for part in dealt)
        tokens = [lengths[part].sum() for part in dealt]
        assert max(tokens) - min(tokens) <= lengths.min() + 8
    assert [part.tolist() for part in deal([5, 1, 1, 1, 5, 3], 2)] == [[0, 5], [1, 2, 3, 4]]


def test_equal_unknown_or_no_lengths_deal_equal_counts():
    for dealt in (deal([7] * 10, 3), deal([0] * 10, 3), deal(None, 3, rows=10)):
        assert [part.tolist() for part in dealt] == [[0, 3, 6, 9], [1, 4, 7], [2, 5, 8]]
    assert [len(part) for part in deal([1, 2], 4)] == [1, 1, 0, 0]
    with pytest.raises(ValueError, match="rows must say how many"):
        deal(None, 2)
    with pytest.raises(ValueError, match="5 rows but 2 lengths"):
        deal([1, 2], 2, rows=5)
