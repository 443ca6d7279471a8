"""Listwise matching, and layouts whose rows are put together anew."""

import math

import pytest
import torch
from parity_text import some_batch, some_samples, word_tokenizer
from torch import nn

from mmpre.attention import Full
from mmpre.draw import Draw
from mmpre.encoder import bert_encoder
from mmpre.heads.vocabulary import Vocabulary
from mmpre.layout import Layout
from mmpre.masking.random import RandomTokens
from mmpre.modalities.regions import RegionReader, Regions
from mmpre.modalities.text import Text, TextReader
from mmpre.network import Network
from mmpre.objectives.among import Among
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.view import View

DRAW = Draw.micro_batch(0, 0, 0, 0)


@pytest.fixture
def net():
    torch.manual_seed(0)
    text = Text(TextReader(word_tokenizer(), max_length=16), width=32, dropout=0.0)
    image = Regions(RegionReader(16, 7), width=32, types=text.types, dropout=0.0)
    return Network({"image": image, "text": text}, bert_encoder(32, 2, 4, dropout=0.0, attention_dropout=0.0))


def among(**more):
    torch.manual_seed(2)
    return Among("image", "text", "text", nn.Linear(32, 1), **more)


def test_pairs_hold_the_tokens_of_the_rows_they_are_made_of():
    layout = Layout({"a": torch.tensor([2, 1, 3]), "b": torch.tensor([1, 4, 0])})
    name_N = [(role, row, n) for row in range(3) for role in "ab" for n in range(int(layout.lengths[role][row]))]
    a_P, b_P = torch.tensor([0, 2, 1, 1]), torch.tensor([1, 0, 1, 2])
    made, place_n, order_P = layout.pair({"a": a_P, "b": b_P})
    assert made.lengths_B.tolist() == sorted(made.lengths_B.tolist()) == [1, 4, 5, 6]
    got = [name_N[place] for place in place_n.tolist()]
    expected = [
        (role, int(row_P[pair]), n)
        for pair in order_P.tolist()
        for role, row_P in (("a", a_P), ("b", b_P))
        for n in range(int(layout.lengths[role][row_P[pair]]))
    ]
    assert got == expected


def test_a_pair_of_rows_that_belong_together_equals_the_plain_pass(net):
    batch = some_batch(View(), net.readers, some_samples(5))
    x_ND, own_B = net.embed(batch), torch.arange(5)
    layout, place_n, order_P = batch.layout.pair({"image": own_B, "text": own_B})
    again = net.encode(x_ND[place_n], layout, Full().plan(layout), at=layout.first("text"))
    plain = net(batch, at=batch.layout.first("text"))
    torch.testing.assert_close(again, plain[order_P], atol=1e-6, rtol=0)


def test_the_loss_is_that_of_each_rows_options_scored_one_by_one(net):
    samples, objective = some_samples(6), among(options=3, temperature=0.5)
    batch = some_batch(View(), net.readers, samples)
    loss = objective(net, net.embed(batch), batch, DRAW)
    option_BO = objective.choose(6, DRAW)
    assert all(len(set(row)) == 3 and row[0] == i for i, row in enumerate(option_BO.tolist()))
    by_key = {sample.key: sample for sample in samples}
    total, right = 0.0, 0
    for row in range(6):
        scores = []
        for option in option_BO[row].tolist():
            picture, caption = by_key[batch.keys[row]], by_key[batch.keys[option]]
            mixed = picture.members | {"txt": caption.members["txt"]}
            one = some_batch(View(), net.readers, [type(picture)("x", "s", "d", mixed)])
            scores.append(objective.head(net(one, at=one.layout.first("text"))).flatten() / 0.5)
        scores = torch.cat(scores)
        total += -scores.log_softmax(0)[0].item()
        right += int(scores.argmax() == 0)
    assert loss.terms[0].sum.item() == pytest.approx(total, rel=1e-4)
    assert loss.metrics["vtm_accuracy"][0] == right


def test_equal_texts_cost_the_logarithm_of_the_number_of_options(net):
    samples = some_samples(5)
    same = [type(s)(s.key, s.shard, s.digest, s.members | {"txt": b"w1 w2"}) for s in samples]
    batch = some_batch(View(), net.readers, same)
    loss = among()(net, net.embed(batch), batch, DRAW)
    assert loss.terms[0].sum.item() / 5 == pytest.approx(math.log(4), rel=1e-4)


def test_few_rows_have_few_options_and_one_row_costs_nothing(net):
    objective = among()
    assert objective.choose(3, DRAW).shape == (3, 3)
    batch = some_batch(View(), net.readers, some_samples(1))
    loss = objective(net, net.embed(batch), batch, DRAW).terms[0].sum
    assert loss.item() == 0
    loss.backward()


def test_it_shares_the_embedded_tokens_with_other_losses(net):
    text = net.modalities["text"]
    words = View(picks={"word": RandomTokens(role="text", rate=0.3)}, corruption=text.reader.replacement())
    objective = OnePass(net, [Predict("word", Vocabulary(text.table))], again=[among()])
    loss = objective(some_batch(words, net.readers, some_samples(6)), DRAW)
    assert [term.name for term in loss.terms] == ["word", "vtm"]
    loss.total({"rows": 6, "picked:word": 9}).backward()
    assert net.modalities["image"].project.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("wrong", [{"options": 1}, {"temperature": 0.0}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="options must be at least 2 and temperature above 0"):
        among(**wrong)
