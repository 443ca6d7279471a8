"""Words that are remembered give the pieces that cutting the whole text gives."""

import random

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from mmpre.data import words
from mmpre.data.vocabulary import Pieces

LETTERS = ["a", "B", "é", "e\u0301", "\u0301", "ﬁ", "Σ", "ß", "İ", "中", "日本", "!", "-", "'", "#", "##", "x1", "🐻"]
LETTERS += ["\n", "\t", *" " * 3, "  ", "\u00a0", "\u2003", "\u200b", "\x1c", "\u00a8", "[MASK]", "[UNK]"]
NORMALIZERS = {
    "none": None,
    "ours": normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]),
    "BERT's": normalizers.BertNormalizer(),
    "compatible": normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]),
}
SPLITTERS = [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Whitespace(), pre_tokenizers.WhitespaceSplit()]


def pieces(normalizer, splitter, added=()):
    known = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"{mark}{c}" for c in "abexé中-!'#s" for mark in ("", "##")), "ba"]
    made = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(known)}, unk_token="[UNK]"))
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = splitter
    made.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    made.add_tokens(list(added))
    return Pieces(made.to_str(), "pieces", None)


@pytest.mark.parametrize("splitter", SPLITTERS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("normalizer", NORMALIZERS.values(), ids=NORMALIZERS)
def test_remembered_words_are_cut_as_the_whole_text_is(normalizer, splitter):
    vocabulary, rng = pieces(normalizer, splitter), random.Random(0)
    assert vocabulary.words is not None
    for _ in range(500):
        text = "".join(rng.choices(LETTERS, k=rng.randint(1, 30)))
        whole = vocabulary.backend.encode(text, add_special_tokens=False)
        for _ in range(2):  # learned, then remembered
            ids_W, word_W = vocabulary.cut(text)
            assert ids_W.tolist() == whole.ids, repr(text)
            assert word_W.tolist() == whole.word_ids, repr(text)


def test_a_tokenizer_that_looks_beyond_spaces_cuts_whole_texts():
    assert pieces(None, SPLITTERS[0], added=["a bear"]).words is None
    assert pieces(normalizers.Replace(" ", "_"), SPLITTERS[0]).words is None
    assert pieces(None, pre_tokenizers.Metaspace()).words is None
    assert pieces(None, pre_tokenizers.Sequence([SPLITTERS[2], pre_tokenizers.Metaspace()])).words is None


def test_memory_is_bounded_and_long_parts_are_not_kept(monkeypatch):
    monkeypatch.setattr(words, "MOST_PARTS", 3)
    vocabulary = pieces(None, SPLITTERS[0])
    for text in ("a b e x", "s " + "a" * 100):
        assert vocabulary.cut(text)[0].tolist() == vocabulary.backend.encode(text, add_special_tokens=False).ids
    assert set(vocabulary.words.known) == {"a", "b", "e"}
