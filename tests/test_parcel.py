"""What goes through a parcel comes out as it was; its tensors lie in one shared memory."""

import multiprocessing
from dataclasses import dataclass

import pytest
import torch

from mmpre.data.parcel import unwrap, wrap
from mmpre.data.prefetch import LoadingError, Prefetch
from mmpre.layout import Layout
from mmpre.tokens import Tokens


@dataclass(frozen=True)
class Thing:
    name: str
    parts: dict
    numbers: tuple


KINDS = [torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
         torch.float64, torch.complex64]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (7,), (5, 3)])
def test_tensors_of_all_kinds_and_shapes_come_out_as_they_were(kind, shape):
    one = (torch.randn(shape, dtype=torch.float64) * 50).abs().to(kind)
    made = unwrap(wrap([torch.ones(3, dtype=torch.uint8), one]))[1]
    assert made.dtype == kind and made.shape == one.shape and torch.equal(made, one)


def test_a_thing_comes_out_whole_with_one_copy_of_a_tensor_that_it_holds_twice():
    wide_NE = torch.arange(40).view(8, 5)
    grown = torch.ones(2, requires_grad=True)
    made = Thing("a", {"b": [wide_NE, wide_NE.t(), wide_NE[2:4], wide_NE]}, (1, None, grown, torch.ones(1).expand(4)))
    parcel = wrap(made)
    assert parcel.buffer_X.is_shared()
    again = unwrap(parcel)
    for name, one in enumerate(made.parts["b"]):
        assert torch.equal(again.parts["b"][name], one)
    assert again.name == "a" and again.numbers[:2] == (1, None) and torch.equal(again.numbers[3], torch.ones(4))
    assert again.numbers[2].requires_grad and torch.equal(again.numbers[2], grown)
    first, *_, last = again.parts["b"]
    assert first.data_ptr() == last.data_ptr() != again.parts["b"][1].data_ptr()
    held = [one.untyped_storage().data_ptr() for one in again.parts["b"]]
    assert set(held) == {parcel.buffer_X.untyped_storage().data_ptr()}


def test_tokens_and_layouts_with_what_they_have_made_come_out_as_they_were():
    tokens = Tokens.of_row(torch.tensor([0, -1, -1]), ids=torch.tensor([5, 6, 7]), patch=torch.rand(3, 4))
    layout = Layout({"text": torch.tensor([3, 1]), "image": torch.tensor([0, 2])})
    _ = layout.index, layout.source_N
    again, placed = unwrap(wrap((tokens, layout)))
    assert torch.equal(again["ids"], tokens["ids"]) and torch.equal(again["patch"], tokens["patch"])
    assert torch.equal(placed.source_N, layout.source_N) and "index" in placed.__dict__ and placed.size == 6


class Makes:
    """Makes a tensor of the asked size, or what cannot be pickled."""

    def note(self, unit):
        pass

    def name(self, unit):
        return str(unit)

    def __getitem__(self, asked):
        return {"value": torch.arange(asked.step), "also": (lambda: 0) if asked.m else None}


@dataclass(frozen=True)
class Asked:
    step: int
    m: int


def test_a_worker_hands_over_parcels_and_says_what_it_cannot_hand_over():
    loading = Prefetch(Makes(), [Asked(3, 0), Asked(0, 0), Asked(70_000, 0), Asked(1, 1)], workers=1)
    try:
        for size in (3, 0, 70_000):
            assert torch.equal(next(loading)["value"], torch.arange(size))
        with pytest.raises(LoadingError, match=r"worker 0, step 1: what it made cannot be handed over .*lambda"):
            next(loading)
    finally:
        loading.close()
    assert not multiprocessing.active_children()
