import pytest
import torch
import torch.nn.functional as F
import transformers
from parity_text import (
    SPECIALS,
    WORDS,
    copy_embeddings,
    copy_encoder,
    copy_head,
    losses_of,
    padded,
    some_batch,
    some_samples,
    vary,
    word_tokenizer,
)

from mmpre.draw import Draw
from mmpre.encoder import bert_encoder
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.random import RandomTokens
from mmpre.modalities.text import Text, TextReader
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipes.bert import bert, scales
from mmpre.view import View

DRAW = Draw.micro_batch(0, 0, 0, 0)
VOCABULARY = len(SPECIALS) + len(WORDS)
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
    attn_implementation="eager",
)  # fmt: skip


def some_net():
    torch.manual_seed(1)
    text = Text(TextReader(word_tokenizer(), max_length=16), width=32, dropout=0.0)
    return Network({"text": text}, bert_encoder(32, 3, 4, dropout=0.0, attention_dropout=0.0))


def words_view(reader):
    return View(picks={"word": RandomTokens(role="text", rate=0.15)}, corruption=reader.replacement())


@pytest.fixture
def theirs():
    torch.manual_seed(0)
    config = transformers.BertConfig(max_position_embeddings=16, layer_norm_eps=1e-12, **SIZES)
    model = transformers.BertForMaskedLM(config).eval()
    vary(model)
    return model


def some_pair(theirs):
    net = some_net()
    head = Vocabulary(net.modalities["text"].table)
    copy_embeddings(net.modalities["text"], theirs.bert.embeddings)
    copy_encoder(net.encoder, theirs.bert.encoder)
    copy_head(head, theirs.cls.predictions)
    return net, head


def test_states_of_a_ragged_batch_equal_those_of_transformers_bert(theirs):
    net, _ = some_pair(theirs)
    batch = some_batch(View(), net.readers, some_samples(9))
    ids, valid = padded(batch)
    assert len(set(batch.layout.lengths_B.tolist())) > 3
    expected = theirs.bert(input_ids=ids, attention_mask=valid.long()).last_hidden_state[valid]
    torch.testing.assert_close(net(batch), expected, atol=1e-5, rtol=0)


def test_masked_prediction_equals_transformers_in_loss_and_in_every_gradient(theirs):
    net, head = some_pair(theirs)
    objective = OnePass(net, [Predict("word", head, name="mlm")])
    batch = some_batch(words_view(net.readers["text"]), net.readers, some_samples(9))
    loss = objective(batch, DRAW)
    ours = loss.total(batch.counts)
    ours.backward()

    ids, valid = padded(batch)
    labels_N = torch.full((batch.layout.size,), -100)
    picked = batch.picked["word"]
    labels_N[picked.seen_M] = batch.clean["text"]["ids"][picked.clean_M]
    labels, _ = padded(batch, labels_N)
    output = theirs(input_ids=ids, attention_mask=valid.long(), labels=labels.masked_fill(~valid, -100))
    torch.testing.assert_close(ours, output.loss, atol=1e-5, rtol=1e-5)
    right, count = (output.logits.argmax(-1) == labels)[valid].sum(), len(picked)
    assert loss.metrics["mlm_accuracy"][0] == right and batch.counts["picked:word"] == count > 9

    output.loss.backward()
    for parameter in theirs.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = some_pair(theirs)  # the same modules, filled with gradients in place of weights
    compared = 0
    for ours, expected in zip((net, head), gradients, strict=True):
        for (name, parameter), (_, grad) in zip(ours.named_parameters(), expected.named_parameters(), strict=True):
            if "types" in name:  # only row 0 was copied
                torch.testing.assert_close(parameter.grad[0], grad[0], atol=1e-5, rtol=1e-4)
                continue
            assert grad.abs().sum() > 0, name
            assert torch.allclose(parameter.grad, grad, atol=1e-5, rtol=1e-4), name
            compared += 1
    assert compared > 40


def test_states_equal_those_of_transformers_roberta():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        max_position_embeddings=18, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5, **SIZES
    )
    theirs = transformers.RobertaModel(config).eval()
    vary(theirs)
    reader = TextReader(word_tokenizer(roberta=True), max_length=16)
    torch.manual_seed(1)
    text = Text(reader, width=32, first_position=2, types=1, dropout=0.0, eps=1e-5)
    net = Network({"text": text}, bert_encoder(32, 3, 4, dropout=0.0, attention_dropout=0.0, eps=1e-5))
    copy_embeddings(text, theirs.embeddings)
    copy_encoder(net.encoder, theirs.encoder)
    batch = some_batch(View(), net.readers, some_samples(9))
    _, valid = padded(batch)
    ids = padded(batch)[0].masked_fill(~valid, 1)
    expected = theirs(input_ids=ids, attention_mask=valid.long()).last_hidden_state[valid]
    torch.testing.assert_close(net(batch), expected, atol=1e-5, rtol=0)


def test_what_was_hidden_cannot_be_read_from_any_state():
    net = some_net().eval()
    view = words_view(net.readers["text"])
    samples = some_samples(9)
    batch = some_batch(view, net.readers, samples)
    seen, clean, picked = batch.seen["text"]["ids"], batch.clean["text"]["ids"], batch.picked["word"].clean_M
    hidden = picked[seen[picked] != clean[picked]]
    assert len(hidden) > 5
    other = clean.clone()
    other[hidden] = (other[hidden] - 5 + 7) % len(WORDS) + 5
    start, changed = 0, []
    for sample, length in zip((samples[int(key)] for key in batch.keys), batch.layout.lengths_B.tolist(), strict=True):
        text = " ".join(f"w{i - 5}" for i in other[start + 1 : start + length - 1].tolist()).encode()
        changed.append((sample, type(sample)(sample.key, sample.shard, sample.digest, sample.members | {"txt": text})))
        start += length
    by_key = {one.key: one for _, one in changed}
    again = some_batch(view, net.readers, [by_key[sample.key] for sample in samples])
    assert not torch.equal(again.clean["text"]["ids"], clean)
    assert torch.equal(net(again), net(batch))


def test_the_recipe_at_its_base_scale_has_berts_110_million_parameters(tmp_path):
    word_tokenizer(30_522).save(str(tmp_path / "tokenizer.json"))
    with torch.device("meta"):
        recipe = bert(tokenizer=str(tmp_path))
        large = bert(tokenizer=str(tmp_path), **scales["large"])
        theirs = transformers.BertForMaskedLM(transformers.BertConfig())
    assert sum(p.numel() for p in recipe.network.encoder.parameters()) == 85_054_464
    count = sum(p.numel() for p in recipe.module().parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) == 109_514_298
    assert abs(sum(p.numel() for p in large.module().parameters()) / 335e6 - 1) < 0.01


def test_the_tiny_scale_learns():
    recipe = bert(**scales["tiny"] | dict(batch=8, length=32, width=32, depth=2))
    losses = losses_of(recipe, some_samples(8, most=8), 60)
    assert sum(losses[-5:]) / 5 < 0.6 * sum(losses[:5]) / 5
    assert F.cross_entropy(torch.zeros(1, 259), torch.tensor([0])).item() == pytest.approx(losses[0], rel=0.1)
