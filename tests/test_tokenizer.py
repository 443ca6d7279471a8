"""Tokenizers trained from shards serve the text reader."""

import pytest
import torch

from mmpre.data.sample import Sample
from mmpre.data.shards import shard_writer
from mmpre.data.tokenizer import train_tokenizer
from mmpre.draw import Draw
from mmpre.modalities.text import TextReader

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards fix broken quilts".split()


@pytest.fixture
def texts(tmp_path):
    with shard_writer(tmp_path / "texts") as sink:
        for i in range(200):
            sink.write({"__key__": f"t{i}", "txt": " ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9))})
        sink.write({"__key__": "broken", "txt": b"\xff\xfe"})
    return tmp_path / "texts"


@pytest.mark.parametrize("kind", ["wordpiece", "bpe", "unigram"])
def test_a_trained_tokenizer_is_small_and_reads_text(texts, tmp_path, kind):
    vocab = 400 if kind == "bpe" else 80
    out = train_tokenizer([texts], tmp_path / "a" / "tokenizer.json", kind=kind, vocab=vocab)
    again = train_tokenizer([texts], tmp_path / "b" / "tokenizer.json", kind=kind, vocab=vocab)
    if kind != "unigram":  # the library does not repeat that training
        assert out.read_bytes() == again.read_bytes()
    reader = TextReader(out, max_length=32)
    assert reader.vocabulary.size <= vocab
    sample = Sample("k", "s", "d", {"txt": b"the quick brown fox"})
    tokens = reader.tokenize(sample, Draw.row(0, 0, 0, epoch=0, unit=0))
    assert tokens["word"][1:-1].unique().tolist() == [0, 1, 2, 3]
    spans = reader.spans(sample)
    assert len(spans) == len(tokens)
    named = {place for a, b in spans for place in range(a, b)}
    assert {place for place, letter in enumerate(sample.text()) if letter != " "} <= named
    assert (tokens["ids"] < reader.vocabulary.size).all()
    assert torch.equal(tokens["ids"], reader.tokenize(sample, Draw.row(1, 0, 0, epoch=0, unit=0))["ids"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "sentencepiece"}, "kind must be one of wordpiece, bpe, unigram, letters, got 'sentencepiece'"),
        ({"vocab": 3}, "vocab must be more than the 5 special tokens, got 3"),
        ({"suffix": "caption"}, "no sample of .* has a readable .caption"),
    ],
)
def test_a_wrong_request_says_what_was_wanted(texts, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer([texts], tmp_path / "tokenizer.json", **changes)
    assert not (tmp_path / "tokenizer.json").exists()
