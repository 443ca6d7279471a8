"""Do evaluations of words and regions find what is known to be there? With networks that are made to know it."""

import json

import pytest
import safetensors.torch
import torch
from parity_text import AsUnits

from mmpre.attention import Causal
from mmpre.data.sample import Sample
from mmpre.evaluation.grounding import Grounding
from mmpre.evaluation.reading import Reading
from mmpre.evaluation.results import NotMeasured, gain
from mmpre.evaluation.retrieval import PairRetrieval
from mmpre.modalities.regions import RegionReader
from mmpre.modalities.text import TextReader
from mmpre.processes.processes import Processes

READERS = {"text": TextReader("bytes", max_length=40), "image": RegionReader(3)}
NAMES = ["red fox", "owl", "cup"]


def collage(order=(0, 1, 2), **more):
    """A caption of three names, and the regions that they name, in another order."""
    caption, spans = "", {}
    for n in (1, 2, 0):
        caption += ", " if caption else ""
        spans[n] = (len(caption), len(caption) + len(NAMES[n]))
        caption += NAMES[n]
    boxes = torch.tensor([[0, 0, 0.5, 0.5, 0.5, 0.5, 0.25]]).repeat(3, 1)
    tensors = {"features": torch.eye(3)[list(order)], "boxes": boxes}
    members = {
        "txt": caption.encode(), "json": json.dumps({"regions": [{"span": spans[n]} for n in order]}).encode(),
        "regions.safetensors": safetensors.torch.save(tensors),
    }  # fmt: skip
    return Sample("a", "shard", "digest", members | more)


class Knowing(torch.nn.Module):
    """States that point along the feature of the region which the token belongs to (moved on by `off`)."""

    attend = Causal()

    def __init__(self, samples, off=0):
        super().__init__()
        self.samples, self.off = samples, off

    def forward(self, batch, at=None):
        assert batch.plan.rule == self.attend.plan(batch.layout).rule
        state_ND = torch.zeros(batch.layout.size, 3)
        for row, key in enumerate(batch.keys):
            sample = self.samples[int(key.split()[0])]
            text = torch.arange(int(batch.layout.lengths["text"][row])) + batch.layout.first("text")[row]
            image = torch.arange(3) + batch.layout.first("image")[row]
            order = [feature.argmax() for feature in READERS["image"].tokenize(sample, None)["features"]]
            state_ND[image] = torch.eye(3)[torch.stack(order)]
            for region, tokens in enumerate(Grounding(self, READERS).named(sample)):
                state_ND[text[tokens]] = torch.eye(3)[(order[region] + self.off) % 3]
        return state_ND


@pytest.mark.parametrize(("off", "expected"), [(0, 1.0), (1, 0.0)])
def test_grounding_tells_words_that_point_at_their_region_from_those_that_point_elsewhere(off, expected):
    samples = [collage(), collage((2, 0, 1)), collage((1, 0, 2))]
    (result,) = Grounding(Knowing(samples, off), READERS).run(AsUnits(samples), Processes())
    assert (result.value, result.n) == (expected, 9)
    assert result.chance == pytest.approx(1 / 3)


class Looking(torch.nn.Module):
    """A network and head in one: a token costs 1, and 2 more where the region that it names is hidden."""

    attend = Causal()

    def __init__(self, sample, off=0, readers=READERS):
        super().__init__()
        self.sample, self.off, self.readers = sample, off, readers

    def forward(self, batch, at=None):
        assert batch.plan.rule == self.attend.plan(batch.layout).rule
        cost_N = torch.ones(batch.layout.size)
        replaced_BR = batch.replaced["image"].view(-1, 3)
        for row in range(len(batch.layout)):
            for region, tokens in enumerate(Grounding(self, self.readers).named(self.sample)):
                places = torch.tensor(tokens, dtype=torch.int64) + batch.layout.first("text")[row]
                cost_N[places] += 2 * replaced_BR[row, (region + self.off) % 3]
        return cost_N[at]


@pytest.mark.parametrize(("off", "expected"), [(0, 1.0), (1, 0.0)])
def test_reading_finds_the_region_without_which_a_hidden_name_is_lost(off, expected):
    sample = collage((2, 0, 1))
    looking = Looking(sample, off)
    reading = Reading(looking, lambda state_M, tokens, index_M: state_M, READERS)
    named_W, cost_WR = reading.costs(sample, Processes())
    assert named_W.tolist() == [0, 1, 2]
    lengths = [len(NAMES[n]) for n in (2, 0, 1)]
    assert cost_WR.tolist() == torch.diag(2.0 * torch.tensor(lengths)).roll(off, 1).tolist()
    (result,) = reading.run(AsUnits([sample]), Processes())
    assert (result.value, result.n) == (expected, 3)


def test_a_name_that_a_caption_was_cut_before_is_left_out_and_the_others_keep_their_regions():
    short = READERS | {"text": TextReader("bytes", max_length=12)}  # "owl, cup, r": region 0 is not named
    sample = collage()
    reading = Reading(Looking(sample, readers=short), lambda state_M, tokens, index_M: state_M, short)
    named_W, cost_WR = reading.costs(sample, Processes())
    assert named_W.tolist() == [1, 2] and cost_WR.argmax(1).tolist() == [1, 2]
    (result,) = reading.run(AsUnits([sample]), Processes())
    assert (result.value, result.n) == (1.0, 2)


def test_damaged_rows_are_passed_over_and_what_nothing_says_is_not_measured():
    samples = [collage(), collage(**{"regions.safetensors": b"junk"}), collage((2, 0, 1)), collage((1, 0, 2))]
    whole = [one for i, one in enumerate(samples) if i != 1]
    (result,) = Grounding(Knowing(whole), READERS).run(AsUnits(samples), Processes())
    assert (result.value, result.n) == (1.0, 9)

    def score(batch):
        return torch.tensor([float(query == item) for query, item in map(str.split, batch.keys)])

    found = PairRetrieval(score, READERS, attend=Causal()).run(AsUnits(samples), Processes())
    assert {one.n for one in found} == {3} and found[0].value == 1.0
    silent = AsUnits([collage(json=json.dumps({"regions": []}).encode())])
    for evaluation in (
        Grounding(Knowing(silent.samples), READERS),
        Reading(Looking(silent.samples[0]), lambda state_M, tokens, index_M: state_M, READERS),
    ):
        with pytest.raises(NotMeasured, match="there is nothing to average"):
            evaluation.run(silent, Processes())
    with pytest.raises(NotMeasured, match="retrieval: wanted two rows that can be read, got 1"):
        PairRetrieval(score, READERS, attend=Causal()).run(AsUnits(samples[:2]), Processes())


def test_a_sample_that_does_not_say_what_its_words_name_is_told():
    sample = collage(json=b"{}")
    with pytest.raises(ValueError, match="sample a does not say which words name its regions"):
        Grounding(Knowing([sample]), READERS).named(sample)


def test_a_lower_mean_rank_is_the_better_one_and_rows_are_planned_as_is_said():
    samples = [collage(), collage((2, 0, 1)), collage((1, 0, 2))]

    def ranks(sign):
        """Of a network that finds a caption's own picture always first, or always last."""

        def score(batch):
            assert batch.plan.rule == Causal().plan(batch.layout).rule
            return torch.tensor([sign * float(query == item) for query, item in map(str.split, batch.keys)])

        found = PairRetrieval(score, READERS, attend=Causal()).run(AsUnits(samples), Processes())
        return [one for one in found if one.name.endswith("mean rank")]

    for good, bad in zip(ranks(1), ranks(-1), strict=True):
        assert (good.value, bad.value, good.less) == (1.0, 3.0, True)
        assert gain(good, bad) == {"value": 2.0, "low": 2.0, "high": 2.0}
