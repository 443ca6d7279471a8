import ot
import pytest
import torch

from mmpre.layout import Layout
from mmpre.objectives.transport import IPOT, cosine_cost, distances, transport

SIZES = [(12, 20), (5, 3), (3, 10), (62, 100), (1, 7), (9, 1)]


def sides(m, n, seed=0, width=16):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(m, width, generator=g), torch.randn(n, width, generator=g)


def exact(cost):
    m, n = cost.shape
    return float(ot.emd2([1 / m] * m, [1 / n] * n, cost.double().numpy()))


def written_out(cost_BXY, x_BX, y_BY, beta, iterations):
    """The authors' loop, pads and all, with T as regions x words."""
    m_B1, n_B1 = x_BX.sum(1, keepdim=True).float(), y_BY.sum(1, keepdim=True).float()
    valid = (y_BY[:, :, None] & x_BX[:, None]).float()
    sigma, plan = x_BX / m_B1, valid.clone()
    kernel = torch.exp(-cost_BXY.mT / beta) * valid
    for _ in range(iterations):
        q = kernel * plan
        delta = 1 / (n_B1 * (q @ sigma[:, :, None])[..., 0] + 1e4 * ~y_BY)
        sigma = 1 / (m_B1 * (q.mT @ delta[:, :, None])[..., 0] + 1e4 * ~x_BX)
        plan = delta[:, :, None] * q * sigma[:, None]
    return plan.mT


def padded_batch(seed=3):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(6, 9, 16, generator=g), torch.randn(6, 7, 16, generator=g)
    x_BX = torch.arange(9) < torch.tensor([9, 4, 1, 5, 9, 2])[:, None]
    y_BY = torch.arange(7) < torch.tensor([7, 2, 3, 1, 4, 7])[:, None]
    return cosine_cost(x, y), x_BX, y_BY


@pytest.mark.parametrize("size", SIZES)
def test_the_distance_is_within_half_a_percent_of_the_exact_one_and_a_twentieth_after_200_iterations(size):
    for seed in range(3):
        x, y = sides(*size, seed=seed)
        cost = cosine_cost(x[None], y[None])[0]
        best = exact(cost)
        assert (cost * transport(x, y)).sum() == pytest.approx(best, rel=5e-3)
        assert (cost * transport(x, y, IPOT(iterations=200))).sum() == pytest.approx(best, rel=5e-4)


def test_the_plan_is_that_of_the_authors_loop_with_its_pads():
    cost, x_BX, y_BY = padded_batch()
    plan = IPOT().plan(cost, x_BX, y_BY)
    torch.testing.assert_close(plan, written_out(cost, x_BX, y_BY, 0.5, 50), atol=1e-6, rtol=1e-4)


def test_marginals_mass_and_pads():
    cost, x_BX, y_BY = padded_batch()
    plan = IPOT().plan(cost, x_BX, y_BY)
    assert (plan[~(x_BX[:, :, None] & y_BY[:, None])] == 0).all()
    torch.testing.assert_close(plan.sum((1, 2)), torch.ones(6))
    torch.testing.assert_close(plan.sum(2), x_BX / x_BX.sum(1, keepdim=True), atol=1e-5, rtol=0)
    y_part = y_BY / y_BY.sum(1, keepdim=True)
    assert (plan.sum(1) - y_part).abs().max() < 0.04 * y_part.max()


def packed_states(lengths, seed=0, width=16):
    layout = Layout({role: torch.tensor(each) for role, each in lengths.items()})
    return torch.randn(layout.size, width, generator=torch.Generator().manual_seed(seed)), layout


def test_a_packed_batch_gives_each_row_its_own_distance_and_a_gradient_through_the_cost_alone():
    states, layout = packed_states({"text": [4, 9, 2, 6], "image": [3, 1, 5, 2]})
    states.requires_grad_()
    distance_B = distances(states, layout, ("text", "image"), IPOT())
    (grad,) = torch.autograd.grad(distance_B.sum(), states)
    alone = states.detach().clone().requires_grad_()
    for row, distance in enumerate(distance_B):
        own = {role: torch.repeat_interleave(layout.lengths[role]) == row for role in layout.roles}
        x, y = (alone[layout.index[role][own[role]]] for role in layout.roles)
        plan = transport(x, y)
        assert not plan.requires_grad
        again = (cosine_cost(x[None], y[None])[0] * plan).sum()
        torch.testing.assert_close(again, distance)
        again.backward()
    torch.testing.assert_close(alone.grad, grad)


def test_a_neighbour_changes_nothing():
    states, layout = packed_states({"text": [4, 9, 2], "image": [3, 1, 5]})
    before = distances(states, layout, ("text", "image"), IPOT())
    changed = states.clone()
    changed[layout.row_N != 1] = 100.0
    assert torch.equal(distances(changed, layout, ("text", "image"), IPOT())[1], before[1])


def test_half_precision_states_are_moved_in_full_precision():
    states, layout = packed_states({"text": [4, 2], "image": [3, 5]})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = distances(states.bfloat16(), layout, ("text", "image"), IPOT())
    assert lowered.dtype == torch.float32
    torch.testing.assert_close(lowered, distances(states.bfloat16().float(), layout, ("text", "image"), IPOT()))


def test_equal_states_opposite_states_and_zeros_stay_finite():
    x, y = sides(5, 4)
    for a, b in ((x[:1].expand(5, -1), x[:1].expand(4, -1)), (x[:4], -x[:4]), (x * 0, y), (x * 1e4, y * 1e-4)):
        plan = transport(a, b)
        assert plan.isfinite().all() and plan.sum() == pytest.approx(1, abs=1e-4)


def test_a_row_that_lacks_a_side_is_named():
    states, layout = packed_states({"text": [4, 2], "image": [3, 0]})
    with pytest.raises(ValueError, match="row 1 has no token of role 'image'"):
        distances(states, layout, ("text", "image"), IPOT())


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"got beta 0\.0, iterations 50"):
        IPOT(beta=0.0)
