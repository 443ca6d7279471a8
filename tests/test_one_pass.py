import pytest
import torch
import torch.nn.functional as F
from parity_text import some_batch, some_samples, word_tokenizer

from mmpre.draw import Draw
from mmpre.encoder import bert_encoder
from mmpre.heads.matching import Matching
from mmpre.heads.region import ClassScores, RegionClassKL, RegionFeature
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.modalities.regions import RegionReader, Regions
from mmpre.modalities.text import Text, TextReader
from mmpre.network import Network
from mmpre.objectives.one_pass import Align, Match, OnePass, Predict
from mmpre.objectives.transport import IPOT, distances
from mmpre.view import OtherSample, View

DRAW = Draw.micro_batch(0, 0, 0, 0)
SAMPLES = some_samples(9)


@pytest.fixture
def net():
    torch.manual_seed(0)
    text = Text(TextReader(word_tokenizer(), max_length=16), width=32, dropout=0.0)
    image = Regions(RegionReader(16, 7), width=32, types=text.types, dropout=0.0)
    return Network({"text": text, "image": image}, bert_encoder(32, 2, 4, dropout=0.0, attention_dropout=0.0))


class Counted(Network):
    """Notes what is asked of it."""

    asked = ()

    def encode(self, x_ND, layout, plan, *, at=None, read=None):
        self.asked = (*self.asked, at)
        return super().encode(x_ND, layout, plan, at=at, read=read)


def hiding(net):
    picks = {name: RandomTokens(role=role, rate=0.15) for name, role in (("word", "text"), ("region", "image"))}
    return View(picks=picks, corruption={"word": net.modalities["text"].reader.replacement(), "region": HideAll()})


def readouts(net):
    text, image = net.modalities["text"], net.modalities["image"]
    return [
        Predict("word", Vocabulary(text.table), name="mlm"),
        Predict("region", RegionFeature(image.project), name="mrfr"),
        Predict("region", RegionClassKL(ClassScores(32, 7)), name="mrckl", weight=0.5),
    ]


def test_several_losses_come_from_one_pass_over_the_places_they_ask_for(net):
    net.__class__ = Counted
    batch = some_batch(hiding(net), net.readers, SAMPLES)
    several = readouts(net)
    loss = OnePass(net, several)(batch, DRAW)
    assert [(term.name, term.per, term.weight) for term in loss.terms] == [
        ("mlm", "picked:word", 1.0), ("mrfr", "picked:region", 1.0), ("mrckl", "picked:region", 0.5),
    ]  # fmt: skip
    assert set(loss.metrics) == {"mlm_accuracy", "mrckl_accuracy"}
    assert len(net.asked) == 1
    assert len(net.asked[0]) == batch.counts["picked:word"] + 2 * batch.counts["picked:region"] < batch.layout.size
    for readout, term in zip(several, loss.terms, strict=True):
        (alone,) = OnePass(net, [readout])(batch, DRAW).terms
        torch.testing.assert_close(term.sum, alone.sum)


def test_the_terms_are_what_the_heads_say_about_all_states(net):
    batch = some_batch(hiding(net), net.readers, SAMPLES)
    state_ND = net(batch)
    several = readouts(net)
    loss = OnePass(net, several)(batch, DRAW)
    for readout, term in zip(several, loss.terms, strict=True):
        picked = batch.picked[readout.pick]
        places = batch.layout.at(picked.role, picked.seen_M)
        expected = readout.head(state_ND[places], batch.clean[picked.role], picked.clean_M).sum()
        torch.testing.assert_close(term.sum, expected)


def pairs(net):
    return some_batch(View(donors={"image": OtherSample(share=0.5)}), net.readers, SAMPLES, seed=1)


def test_matching_and_alignment_read_the_same_pass(net):
    batch = pairs(net)
    matched_B = batch.labels["matched"]
    assert 1 < matched_B.sum() < 8
    match = Match("text", Matching(32))
    loss = OnePass(net, [match, Align(("text", "image"))])(batch, DRAW)
    itm, wra = loss.terms
    state_ND = net(batch)
    scores_B2 = match.head(state_ND[batch.layout.first("text")])
    torch.testing.assert_close(itm.sum, F.cross_entropy(scores_B2, matched_B, reduction="sum"))
    assert loss.metrics["itm_accuracy"][0] == (scores_B2.argmax(1) == matched_B).sum()
    distance_B = distances(state_ND, batch.layout, ("text", "image"), IPOT())
    torch.testing.assert_close(wra.sum, distance_B[matched_B == 1].sum() - distance_B[matched_B == 0].sum())
    assert (itm.per, itm.weight, wra.per, wra.weight) == ("rows", 1.0, "rows", 0.1)
    torch.testing.assert_close(loss.total(batch.counts), (itm.sum + 0.1 * wra.sum) / 9)
    (alone,) = OnePass(net, [match])(batch, DRAW).terms
    torch.testing.assert_close(alone.sum, itm.sum)


def test_a_split_of_the_batch_changes_neither_loss_nor_gradient(net):
    view = hiding(net)
    objective = OnePass(net, readouts(net))

    def gradients(*bounds):
        parts = zip(bounds, [*bounds[1:], len(SAMPLES)], strict=True)
        batches = [some_batch(view, net.readers, SAMPLES[start:end], first=start) for start, end in parts]
        counts = {name: sum(batch.counts[name] for batch in batches) for name in batches[0].counts}
        objective.zero_grad()
        total = sum(objective(batch, DRAW).total(counts) for batch in batches)
        total.backward()
        return [total.detach(), *(p.grad.clone() for p in objective.parameters() if p.grad is not None)]

    for whole, split in zip(gradients(0), gradients(0, 1, 6), strict=True):
        torch.testing.assert_close(whole, split, atol=1e-6, rtol=1e-4)


def test_readers_are_those_of_the_roles_in_use(net):
    assert set(OnePass(net, readouts(net)).readers) == {"text", "image"}
    only = OnePass(net, readouts(net)[:1], roles=("text",))
    assert only.readers == {"text": net.modalities["text"].reader}
    with pytest.raises(ValueError, match=r"roles among \['image', 'text'\], got 1 readouts and roles \['txt'\]"):
        OnePass(net, readouts(net)[:1], roles=("txt",))
    with pytest.raises(ValueError, match="got 0 readouts"):
        OnePass(net, [])


def test_a_pick_or_label_that_the_view_does_not_make_is_named(net):
    batch = some_batch(View(), net.readers, SAMPLES)
    with pytest.raises(KeyError, match=r"no pick 'word' in the batch; the task's view makes \[\]"):
        OnePass(net, readouts(net)[:1])(batch, DRAW)
    for readout in (Match("text", Matching(32)), Align(("text", "image"))):
        with pytest.raises(KeyError, match=f"{type(readout).__name__}: no label 'matched' in the batch"):
            OnePass(net, [readout])(batch, DRAW)
