"""Optimizers agree with their formulas, parameters get the numbers they should, schedules have the values they say."""

import pytest
import timm.optim
import torch
from torch import nn

from mmpre.encoder import bert_encoder
from mmpre.schedules import WSD, Constant, Cosine, CosineRamp, InverseSqrt, Linear, LinearRamp
from mmpre.training.optim import LAMB, AdamW, LayerDecay, set_learning_rate

FLAT = Constant()


def some_parameters(seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        ("a.weight", nn.Parameter(torch.randn(5, 3, generator=g))),
        ("a.bias", nn.Parameter(torch.randn(5, generator=g))),
        ("b.weight", nn.Parameter(torch.zeros(2, 5))),
    ]


def some_gradients(parameters, step):
    g = torch.Generator().manual_seed(100 + step)
    for _, parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=g)


def trained(made, steps=4, schedule=FLAT):
    """What some steps by an optimizer (a value, or how to make one of parameters) leave of some parameters."""
    parameters = some_parameters()
    optimizer = made.build(parameters) if hasattr(made, "build") else made([p for _, p in parameters])
    for step in range(steps):
        some_gradients(parameters, step)
        if hasattr(made, "build"):
            set_learning_rate(optimizer, schedule, step)
        optimizer.step()
    return [parameter.detach() for _, parameter in parameters]


def lamb_by_hand(steps, lr, betas, eps, decay):
    """You et al. 2019, algorithm 2, one parameter at a time, in float64."""
    parameters = some_parameters()
    x = [p.detach().double() for _, p in parameters]
    m, v = ([torch.zeros_like(one) for one in x] for _ in range(2))
    for step in range(steps):
        some_gradients(parameters, step)
        for i, (_, parameter) in enumerate(parameters):
            grad, wanted = parameter.grad.double(), decay if parameter.ndim > 1 else 0.0
            m[i] = betas[0] * m[i] + (1 - betas[0]) * grad
            v[i] = betas[1] * v[i] + (1 - betas[1]) * grad**2
            r = (m[i] / (1 - betas[0] ** (step + 1))) / ((v[i] / (1 - betas[1] ** (step + 1))) ** 0.5 + eps)
            r = r + wanted * x[i]
            scaled = wanted and x[i].norm() > 0
            x[i] = x[i] - lr * (x[i].norm() / r.norm() if scaled else 1.0) * r
    return [one.float() for one in x]


def test_lamb_is_the_papers_algorithm_and_timms():
    ours = trained(LAMB(lr=0.02, schedule=FLAT, betas=(0.9, 0.98), weight_decay=0.1))
    torch.testing.assert_close(ours, lamb_by_hand(4, 0.02, (0.9, 0.98), 1e-6, 0.1), atol=1e-6, rtol=1e-5)
    ours = trained(LAMB(lr=0.02, schedule=FLAT, weight_decay=0.1, decay_vectors=True))
    theirs = trained(lambda p: timm.optim.Lamb(p, lr=0.02, weight_decay=0.1, max_grad_norm=None))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_adamw_is_torchs_fused_one_bit_for_bit():
    ours = trained(AdamW(lr=0.02, schedule=FLAT, betas=(0.9, 0.98), weight_decay=0.1, decay_vectors=True))
    theirs = trained(lambda p: torch.optim.AdamW(p, lr=0.02, betas=(0.9, 0.98), weight_decay=0.1, fused=True))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_adam_without_bias_correction_is_that_of_berts_authors():
    lr, betas, eps, decay = 5e-2, (0.9, 0.999), 1e-6, 0.01
    ours = trained(AdamW(lr=lr, schedule=FLAT, betas=betas, eps=eps, weight_decay=decay, bias_correction=False), 20)
    parameters = some_parameters()
    x = [p.detach().double() for _, p in parameters]
    m, v = ([torch.zeros_like(one) for one in x] for _ in range(2))
    for step in range(20):
        some_gradients(parameters, step)
        for i, (_, parameter) in enumerate(parameters):
            grad = parameter.grad.double()
            m[i] = betas[0] * m[i] + (1 - betas[0]) * grad
            v[i] = betas[1] * v[i] + (1 - betas[1]) * grad**2
            x[i] = x[i] - lr * (m[i] / (v[i].sqrt() + eps) + (decay if parameter.ndim > 1 else 0.0) * x[i])
    torch.testing.assert_close(ours, [one.float() for one in x], atol=1e-5, rtol=1e-5)
    corrected = trained(AdamW(lr=lr, schedule=FLAT, betas=betas, eps=eps, weight_decay=decay), 20)
    assert not torch.allclose(ours[0], corrected[0], atol=0.1)


def test_lamb_leaves_alone_what_has_no_gradient():
    parameters = some_parameters()
    before = [p.detach().clone() for _, p in parameters]
    optimizer = LAMB(lr=0.1, schedule=FLAT).build(parameters)
    parameters[0][1].grad = torch.ones(5, 3)
    optimizer.step()
    assert not torch.equal(parameters[0][1], before[0])
    assert torch.equal(parameters[1][1], before[1]) and torch.equal(parameters[2][1], before[2])


def test_decay_by_schedule_is_decoupledadamw_as_mosaicml_writes_it():
    schedule = Linear(warmup=2, total=9, floor=0.02)
    lr, decay, betas, eps = 5e-2, 1e-2, (0.9, 0.98), 1e-6
    made = AdamW(
        lr=lr, schedule=schedule, betas=betas, eps=eps, weight_decay=decay, decay_vectors=True, decay_by_schedule=True
    )
    ours = trained(made, 6, schedule)
    parameters = some_parameters()
    x = [p.detach().clone() for _, p in parameters]
    m, v = ([torch.zeros_like(one) for one in x] for _ in range(2))
    for step in range(6):
        some_gradients(parameters, step)
        for i, (_, parameter) in enumerate(parameters):
            now = lr * schedule.factor(step)
            x[i] *= 1 - decay * now / lr
            m[i] = betas[0] * m[i] + (1 - betas[0]) * parameter.grad
            v[i] = betas[1] * v[i] + (1 - betas[1]) * parameter.grad**2
            root = (v[i] / (1 - betas[1] ** (step + 1))).sqrt() + eps
            x[i] -= now / (1 - betas[0] ** (step + 1)) * m[i] / root
    torch.testing.assert_close(ours, x, atol=1e-6, rtol=1e-5)


def test_rates_and_decay_by_name_and_the_rate_that_is_logged():
    parameters = some_parameters()
    made = AdamW(lr=1e-3, schedule=FLAT, weight_decay=0.1, no_decay=["b."], rates={"a.": 1e-5})
    optimizer = made.build(parameters)
    names = {id(parameter): name for name, parameter in parameters}
    got = {names[id(p)]: (g["peak_lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert got == {"a.weight": (1e-5, 0.1), "a.bias": (1e-5, 0.0), "b.weight": (1e-3, 0.0)}
    assert set_learning_rate(optimizer, Constant(warmup=1), 0) == 5e-4
    assert {g["lr"] for g in optimizer.param_groups} == {5e-4, 5e-6}


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (dict(rates={"decoder": 1e-3}), "no trained parameter has 'decoder' in its name; the names are like a.weight"),
        (dict(no_decay=["LayerNorm"]), "no trained parameter has 'LayerNorm' in its name"),
        (dict(rates={"a": 1e-3, "bias": 1e-4}), "a.bias has more than one rate, by 'a' and by 'bias'"),
        (dict(layers=LayerDecay(rate=0.8)), "LayerDecay: no parameter's name fits .*blocks"),
    ],
)
def test_a_name_that_fits_nothing_or_two_things_is_an_error(numbers, message):
    with pytest.raises(ValueError, match=message):
        AdamW(lr=1e-3, schedule=FLAT, **numbers).build(some_parameters())


def test_rates_are_checked():
    with pytest.raises(ValueError, match=r"AdamW: rates\['a'\] must be above 0 and below 100, got -1"):
        AdamW(lr=1e-3, schedule=FLAT, rates={"a": -1})
    with pytest.raises(ValueError, match=r"LAMB: betas must lie in \[0, 1\), got \(0.9, 1.0\)"):
        LAMB(lr=1e-3, schedule=FLAT, betas=(0.9, 1.0))


def test_rates_fall_layer_by_layer_towards_the_input():
    module = nn.ModuleDict({
        "network": nn.ModuleDict({"modalities": nn.Linear(4, 8), "encoder": bert_encoder(8, 3, 2)}),
        "tasks": nn.Linear(8, 2),
    })  # fmt: skip
    parameters = list(module.named_parameters())
    optimizer = AdamW(lr=1.0, schedule=FLAT, layers=LayerDecay(rate=0.5)).build(parameters)
    names = {id(parameter): name for name, parameter in parameters}
    got = {names[id(p)]: g["peak_lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(got) == len(parameters)
    places = {
        "tasks": 1.0, "network.encoder.blocks.2": 0.5, "network.encoder.blocks.1": 0.25,
        "network.encoder.blocks.0": 0.125, "network.modalities": 0.0625,
    }  # fmt: skip
    assert all(lr == next(at for place, at in places.items() if name.startswith(place)) for name, lr in got.items())
    assert set_learning_rate(optimizer, FLAT, 0) == 1.0


def test_an_optimizers_state_comes_back_by_name():
    from mmpre.runs import checkpoint

    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    made = LAMB(lr=0.1, schedule=FLAT)
    optimizer = made.build(module.named_parameters())
    module(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    tensors, meta = checkpoint.flatten_optimizer(optimizer, module)
    other = made.build(module.named_parameters())
    checkpoint.restore_optimizer(other, module, tensors, meta)
    assert {n for n, _ in module.named_parameters()} == {label.rpartition("/")[0] for label in tensors}
    for parameter in module.parameters():
        assert all(torch.equal(other.state[parameter][k], v) for k, v in optimizer.state[parameter].items())


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(), {0: 1.0, 10**6: 1.0}),
        (Constant(warmup=3), {0: 0.25, 2: 0.75, 3: 1.0, 9: 1.0}),
        (Linear(warmup=3, total=13, floor=0.1), {0: 0.25, 3: 1.0, 8: 0.55, 13: 0.1, 99: 0.1}),
        (Linear(warmup=0, total=4), {0: 1.0, 1: 0.75, 3: 0.25, 4: 0.0, 5: 0.0}),
        (Cosine(warmup=3, total=13, floor=0.1), {0: 0.25, 3: 1.0, 8: 0.55, 13: 0.1, 99: 0.1}),
        (Cosine(warmup=2, total=20, floor=0.1, cooldown=8),
         {1: 2 / 3, 2: 1.0, 7: 0.55, 11: 0.1 + 0.9 * 0.024471741852423, 12: 0.1, 16: 0.05, 20: 0.0, 30: 0.0}),
        (InverseSqrt(warmup=3, floor=0.2), {0: 0.25, 3: 1.0, 15: 0.5, 63: 0.25, 98: 0.2010075630518424, 10**6: 0.2}),
        (InverseSqrt(warmup=0), {0: 1.0, 3: 0.5}),
        (WSD(warmup=4, total=20, decay=8, floor=0.2), {0: 0.2, 4: 1.0, 12: 1.0, 16: 0.6, 20: 0.2, 50: 0.2}),
        (WSD(warmup=4, total=12, decay=8), {3: 0.8, 4: 1.0, 5: 0.875, 12: 0.0}),
    ],
)  # fmt: skip
def test_schedules_have_these_values_at_their_edges(schedule, values):
    assert {step: schedule.factor(step) for step in values} == pytest.approx(values, abs=1e-9)
    steps = [schedule.factor(step) for step in range(200)]
    assert all(0 <= value <= 1 for value in steps)
    peak = steps.index(1.0)
    assert steps[:peak] == sorted(steps[:peak]) and steps[peak:] == sorted(steps[peak:], reverse=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(warmup=10, total=10), "Linear: warmup must lie between 0 and total - 1, got warmup 10 of 10"),
        (lambda: Cosine(warmup=2, total=10, cooldown=8), "cooldown must fit behind the warm-up, got cooldown 8"),
        (lambda: WSD(warmup=2, total=10, decay=9), "decay must fit behind the warm-up, got decay 9, warmup 2 of 10"),
        (lambda: InverseSqrt(warmup=-1), "InverseSqrt: warmup must not be negative, got -1"),
        (lambda: Linear(warmup=0, total=10, floor=2), "floor is a share of the peak, between 0 and 1, got 2"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_ramps_begin_and_end_where_they_say():
    linear, cosine = LinearRamp(first=0.9, last=1.0, steps=10), CosineRamp(first=0.996, last=1.0, steps=10)
    assert [linear.at(step) for step in (0, 5, 10, 99)] == pytest.approx([0.9, 0.95, 1.0, 1.0])
    assert [cosine.at(step) for step in (0, 5, 10, 99)] == pytest.approx([0.996, 0.998, 1.0, 1.0])
