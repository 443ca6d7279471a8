import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from mmpre.data.sample import BadMember, Sample
from mmpre.draw import Draw
from mmpre.modalities.regions import RegionReader, Regions, _finite
from mmpre.modality import Modality, Reader
from mmpre.tokens import Tokens

E, C = 16, 5
DRAW = Draw.row(0, 0, 0, epoch=0, unit=0)


def some_regions(count=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    low, size = torch.rand(count, 2, generator=g) * 0.5, torch.rand(count, 2, generator=g) * 0.4 + 0.1
    return {
        "features": torch.randn(count, E, generator=g).half(),
        "boxes": torch.cat([low, low + size, size, size.prod(1, keepdim=True)], 1),
        "soft": torch.rand(count, C, generator=g).softmax(1),
    }


def sample(tensors):
    return Sample("a", "shard", "digest", {"regions.safetensors": safetensors.torch.save(tensors)})


def some_module(width=8, **more):
    torch.manual_seed(0)
    return Regions(RegionReader(E, C), width=width, types=nn.Embedding(2, width), **more).eval()


def test_regions_are_read_as_they_are_and_cut_to_the_first_ones():
    tensors = some_regions(6)
    tokens = RegionReader(E, C, max_regions=4).tokenize(sample(tensors), DRAW)
    assert len(tokens) == 4 and (tokens.special_N == -1).all()
    assert torch.equal(tokens["features"], tensors["features"][:4])
    assert tokens["features"].dtype == torch.float16, "half precision stays half until the device"
    assert torch.equal(tokens["box"], tensors["boxes"][:4]) and torch.equal(tokens["soft"], tensors["soft"][:4])
    assert "soft" not in RegionReader(E).tokenize(sample(tensors), DRAW).fields


def test_the_reader_is_a_reader_and_the_module_a_modality_and_the_reader_can_be_pickled():
    reader = RegionReader(E, C)
    assert isinstance(reader, Reader) and isinstance(some_module(), Modality)
    assert pickle.loads(pickle.dumps(reader)) == reader


def broken(name, change):
    tensors = some_regions()
    tensors[name] = change(tensors[name])
    return tensors


def put(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[1, 0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("tensors", "cause", "detail"),
    [
        ({"boxes": some_regions()["boxes"]}, "regions incomplete", r"no tensor 'features' in it, only \['boxes'\]"),
        ({k: v for k, v in some_regions().items() if k != "soft"}, "regions incomplete", "no tensor 'soft'"),
        (broken("features", lambda f: f[:, :7]), "regions of another shape", r"\[regions, 16\].*got \[3, 7\]"),
        (broken("boxes", lambda b: b[:2].clone()), "regions of another shape", r"boxes must be .*got \[2, 7\]"),
        (broken("soft", lambda s: s[:, 1:].contiguous()), "regions of another shape", r"soft must be .*got \[3, 4\]"),
        (broken("features", lambda f: f[0]), "regions of another shape", r"got \[16\]"),
        ({k: v[:0] for k, v in some_regions().items()}, "regions of another shape", r"regions >= 1.*got \[0, 16\]"),
        (broken("features", lambda f: f.int()), "regions of another type", "got torch.int32"),
        (broken("features", put(float("nan"))), "regions not finite", "features holds NaN"),
        (broken("boxes", put(float("inf"))), "regions not finite", "boxes holds NaN"),
        (broken("boxes", lambda b: b * 640), "boxes out of range", "shares of the picture, 0 to 1, got .* divide"),
        (broken("boxes", put(0.99)), "boxes out of range", "ends before it begins"),
        (broken("soft", lambda s: s * 2), "soft labels are no distribution", "sum off by 1"),
        (broken("soft", put(-0.5)), "soft labels are no distribution", "got a least of -0.5"),
    ],
)
def test_regions_that_break_the_contract_cost_their_sample_with_a_cause(tensors, cause, detail):
    with pytest.raises(BadMember, match=detail) as caught:
        RegionReader(E, C).tokenize(sample({k: v.contiguous() for k, v in tensors.items()}), DRAW)
    assert (caught.value.cause, caught.value.member) == (cause, "regions.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_not_finite_is_found_in_every_precision(dtype):
    every = torch.arange(-(2**15), 2**15).to(torch.int16)  # all that half precision can be
    value = every.view(dtype) if dtype != torch.float32 else every.view(torch.float16).float()
    assert 0 < value.isfinite().sum() < len(value)
    for some in (value, value[value.isfinite()], value[value.isnan()][:1], value[value.isinf()][:1], -value[-1:]):
        assert _finite(some) == bool(some.isfinite().all())


def test_a_reader_or_module_with_impossible_numbers_is_refused():
    with pytest.raises(ValueError, match=r"classes at least 2 .*got features 16, max_regions 100, classes 1"):
        RegionReader(E, 1)
    with pytest.raises(ValueError, match=r"at least 2 vectors of width 8 .*got 1 of 8"):
        Regions(RegionReader(E), width=8, types=nn.Embedding(1, 8))


def embed(module, tokens, replaced=()):
    replaced_N = torch.zeros(len(tokens), dtype=torch.bool)
    replaced_N[list(replaced)] = True
    return module.embed(module.features(tokens), tokens, replaced_N)


def test_the_embedding_is_three_layer_norms_and_a_mask_before_the_projection():
    module = some_module()
    for norm in (module.project_norm, module.place_norm, module.norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    tokens = RegionReader(E, C).tokenize(sample(some_regions()), DRAW)
    # As the authors write it: zero the feature, then add row 1 of a table whose row 0 is zero.
    shown = tokens["features"].float().clone()
    shown[1] = 0
    table = torch.stack([torch.zeros(E), module.mask_E])
    shown = shown + table[torch.tensor([0, 1, 0])]
    inner = module.project_norm(module.project(shown)) + module.place_norm(module.place(tokens["box"]))
    expected = module.norm(inner + module.types(torch.ones(3, dtype=torch.int64)))
    torch.testing.assert_close(embed(module, tokens, [1]), expected)


def test_a_replaced_region_hides_its_feature_but_not_its_box():
    module = some_module()
    tokens = RegionReader(E, C).tokenize(sample(some_regions()), DRAW)
    before = embed(module, tokens, [1])
    other = tokens["features"].clone()
    other[1] = 9
    assert torch.equal(before, embed(module, tokens.with_values(features=other), [1]))
    moved = tokens["box"].clone()
    moved[1] = moved[0]
    assert not torch.equal(before[1], embed(module, tokens.with_values(box=moved), [1])[1])
    (grad,) = torch.autograd.grad(embed(module, tokens, [1])[1].sum() * 0 + before[1, 0], module.mask_E)
    assert grad.abs().sum() > 0


def test_the_order_of_regions_does_not_matter():
    module = some_module()
    tokens = RegionReader(E, C).tokenize(sample(some_regions()), DRAW)
    order = torch.tensor([2, 0, 1])
    turned = tokens.with_values(**{name: tokens[name][order] for name in tokens.fields})
    torch.testing.assert_close(embed(module, tokens)[order], embed(module, turned))


def test_dropout_works_in_training_only():
    module = some_module(dropout=0.5)
    tokens = Tokens.pack([RegionReader(E, C).tokenize(sample(some_regions()), DRAW)] * 2)
    assert (embed(module.train(), tokens) == 0).float().mean() > 0.2
    assert (embed(module.eval(), tokens) == 0).float().mean() < 0.05
