"""Masks over tokens on a grid: blocks, tubes, regions that grow."""

import pytest
import torch
from masking import ROWS, clip, packed, rates, row, some_tokens

from mmpre.masking.exact import ExactShare
from mmpre.masking.grid import Blocks, Edges, GridNeighbours, Grown, Tube
from mmpre.tokens import Ragged, Tokens


@pytest.mark.parametrize(
    "shape, share", [((4, 7, 7), 0.150), ((1, 7, 7), 0.081), ((7, 7), 0.081), ((5, 7, 7), 0.185), ((4, 4, 4), 0.119)]
)
def test_blocks_hide_what_violets_authors_code_does(shape, share):
    tokens, mask = clip(*shape), Blocks(role="video")
    shares = torch.tensor([len(mask(tokens, row(unit))) for unit in range(ROWS)]) / (len(tokens) - 1)
    assert abs(shares.mean() - share) < 0.005
    if shape == (4, 7, 7):
        assert abs(shares.std() - 0.054) < 0.005
    assert shares.min() > 0


def test_a_block_of_a_picture_is_a_rectangle_of_1_to_3_a_side_anywhere():
    tokens, mask, sides, rate_N = clip(7, 7), Blocks(role="image"), [], torch.zeros(50)
    for unit in range(10_000):
        index_M = mask(tokens, row(unit))
        place_M2 = tokens["position"][index_M]
        side_2 = place_M2.amax(0) - place_M2.amin(0) + 1
        assert len(index_M) == side_2.prod() and 0 not in index_M
        sides.append(side_2)
        rate_N[index_M] += 1e-4
    shares = torch.stack(sides).flatten().bincount(minlength=4) / 20_000
    assert (shares[1:] - 1 / 3).abs().max() < 0.015
    rate_HW = rate_N[1:].view(7, 7)
    torch.testing.assert_close(rate_HW, rate_HW.flip(0), atol=0.015, rtol=0)
    torch.testing.assert_close(rate_HW, rate_HW.T, atol=0.015, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 5), (2, 1, 1), (3, 2, 9)])
def test_small_grids_lose_at_least_one_token(shape):
    tokens = clip(*shape)
    assert min(len(Blocks(role="video")(tokens, row(unit))) for unit in range(50)) >= 1


def test_a_tube_is_the_same_in_every_frame():
    tokens, inside = clip(4, 5, 5), ExactShare(role="video", share=0.4)
    for unit in range(50):
        index_M = Tube(role="video", inside=inside)(tokens, row(unit))
        assert len(index_M) == 40
        frame = (index_M - 1).view(4, 10)
        assert (frame - 25 * torch.arange(4)[:, None] == frame[0]).all()
    rate_N = rates(Tube(role="video", inside=inside), tokens, 10_000)
    assert (rate_N[1:] - 0.4).abs().max() < 0.02
    blocks = Tube(role="video", inside=Blocks(role="video"))(tokens, row(0))
    assert len(blocks) % 4 == 0


def test_a_region_grows_to_its_share_and_hangs_together():
    tokens, mask = clip(7, 7), Grown(role="image", share=0.3, neighbours=GridNeighbours())
    seeds = torch.zeros(50)
    for unit in range(200):
        index_M = mask(tokens, row(unit))
        assert len(index_M) == 15 and 0 not in index_M
        seeds[index_M] += 1
        left, reached = set(index_M.tolist()), {int(index_M[0])}
        near = {tuple(pair) for pair in GridNeighbours()(tokens).tolist()}
        while grown := {b for b in left - reached for a in reached if (a, b) in near or (b, a) in near}:
            reached |= grown
        assert reached == left
    assert seeds[1:].min() > 0
    rate_N = rates(mask, tokens, 10_000)[1:].view(7, 7)
    assert abs(rate_N.mean() - 15 / 49) < 1e-6
    torch.testing.assert_close(rate_N, rate_N.T, atol=0.02, rtol=0)
    torch.testing.assert_close(rate_N, rate_N.flip(0), atol=0.02, rtol=0)


def test_a_region_grows_over_a_graph_and_from_a_new_seed_where_it_ends():
    edges = Ragged(torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([3]), refers_to="tokens")
    tokens = Tokens.of_row(torch.tensor([-1] * 6 + [0]), edges=edges)
    mask = Grown(role="graph", share=0.67, neighbours=Edges())
    for unit in range(50):
        index_M = mask(tokens, row(unit))
        assert len(index_M) == 4
        pairs = (index_M // 2).bincount(minlength=3).tolist()
        assert sorted(pairs) == [0, 2, 2], "neighbours come before strangers"


def test_masks_on_a_grid_say_what_they_want():
    with pytest.raises(
        ValueError, match=r"\(row, column\) or \(time, row, column\) of each token, got the shape \[9\]"
    ):
        Blocks(role="video")(some_tokens(9), row(0))
    for mask in (
        Blocks(role="v"),
        Tube(role="v", inside=Blocks(role="v")),
        Grown(role="v", share=0.5, neighbours=GridNeighbours()),
    ):
        with pytest.raises(ValueError, match=f"{type(mask).__name__}: works on one row"):
            mask(packed(clip(2, 2), 2), row(0))
        assert len(mask(Tokens.of_row(torch.tensor([0]), position=torch.zeros(1, 2)), row(0))) == 0
