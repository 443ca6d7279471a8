import pickle
from functools import cache
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mmpre.data.sample import BadMember, Sample
from mmpre.draw import Draw
from mmpre.masking.corrupt import HideAll
from mmpre.modalities.text import CLS, ERASED, SEP, ErasedText, Text, TextReader
from mmpre.modality import Modality, Reader
from mmpre.tokens import Tokens
from mmpre.view import View

DRAW = Draw.row(0, 0, 0, epoch=0, unit=0)
SENTENCES = ["a small bear sits under the old tree", "two birds don't fly over the house", "unbelievable trees"]


def sample(text, window=0, key="a"):
    return Sample(key, "shard", "digest", {"txt": text.encode() if isinstance(text, str) else text}, window)


def word_pieces(special=("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]")):
    return Tokenizer.from_str(trained_word_pieces(special))


@cache  # training does not give the same pieces twice
def trained_word_pieces(special):
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(SENTENCES * 9, trainers.WordPieceTrainer(vocab_size=90, special_tokens=list(special)))
    return backend.to_str()


def byte_pairs():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(SENTENCES * 9, trainer)
    return backend


@pytest.fixture(params=["bytes", "word pieces", "byte pairs"])
def tokenizer(request):
    return {"bytes": lambda: "bytes", "word pieces": word_pieces, "byte pairs": byte_pairs}[request.param]()


def test_a_text_stands_between_cls_and_sep_with_words_and_positions(tokenizer):
    reader = TextReader(tokenizer)
    assert isinstance(reader, Reader)
    tokens = reader.tokenize(sample(SENTENCES[1]), DRAW)
    v = reader.vocabulary
    assert tokens["ids"][0] == v.cls and tokens["ids"][-1] == v.sep and tokens["ids"].max() < v.size
    assert tokens.special_N.tolist() == [CLS, *[-1] * (len(tokens) - 2), SEP]
    assert tokens["position"].tolist() == list(range(len(tokens)))
    word_N = tokens["word"]
    assert word_N[0] == word_N[-1] == -1
    assert set(word_N[1:-1].diff().tolist()) <= {0, 1} and word_N[1] == 0


def test_bytes_are_utf8_and_a_word_takes_the_space_before_it():
    tokens = TextReader("bytes").tokenize(sample("ab  ü\tc"), DRAW)
    assert bytes(tokens["ids"][1:-1].tolist()).decode() == "ab  ü\tc"
    assert tokens["word"].tolist() == [-1, 0, 0, 1, 1, 1, 1, 2, 2, -1]


def test_pieces_are_the_tokenizers_own_and_its_padding_and_truncation_are_not_used():
    backend = word_pieces()
    expected = backend.encode(SENTENCES[0], add_special_tokens=False).ids
    backend.enable_padding(length=64)
    backend.enable_truncation(4)
    assert TextReader(backend).tokenize(sample(SENTENCES[0]), DRAW)["ids"][1:-1].tolist() == expected


def test_words_follow_the_tokenizers_word_borders():
    reader = TextReader(word_pieces())
    tokens = reader.tokenize(sample("bearable tree don't"), DRAW)
    made = reader.vocabulary.backend.encode("bearable tree don't", add_special_tokens=False)
    assert tokens["word"][1:-1].tolist() == made.word_ids
    assert made.word_ids[-1] == 4 and len(made.word_ids) > 5


def test_a_tokenizer_is_read_from_a_file_or_the_folder_that_holds_it(tmp_path):
    word_pieces().save(str(tmp_path / "tokenizer.json"))
    readers = [TextReader(source) for source in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path), word_pieces())]
    assert len({tuple(reader.tokenize(sample(SENTENCES[0]), DRAW)["ids"].tolist()) for reader in readers}) == 1


def test_a_text_that_writes_a_special_token_gets_its_letters(tokenizer):
    reader = pickle.loads(pickle.dumps(TextReader(tokenizer)))
    tokens = reader.tokenize(sample("tree [MASK] <mask> [SEP] </s> tree"), DRAW)
    v = reader.vocabulary
    assert not {v.mask, v.cls, v.sep} & set(tokens["ids"][1:-1].tolist())


def test_a_pickled_reader_reads_the_same(tokenizer):
    reader = TextReader(tokenizer, max_length=9, windowed=True)
    again = pickle.loads(pickle.dumps(reader))
    for text in SENTENCES:
        assert torch.equal(reader.tokenize(sample(text), DRAW)["ids"], again.tokenize(sample(text), DRAW)["ids"])
    assert again.digest == reader.digest
    assert len(pickle.dumps(reader)) < len(pickle.dumps(again)) + 100, "what was read is not sent along"


def test_captions_are_cut_off_at_the_length(tokenizer):
    reader = TextReader(tokenizer, max_length=6)
    whole, cut = (r.tokenize(sample(SENTENCES[0]), DRAW)["ids"].tolist() for r in (TextReader(tokenizer), reader))
    assert cut == [*whole[:5], reader.vocabulary.sep]
    assert reader.windows(sample(SENTENCES[0])) == [6]


@pytest.mark.parametrize("length", [3, 7, 10, 16, 30, 512])
def test_windows_hold_every_piece_once_and_end_between_words(tokenizer, length):
    text = " ".join(SENTENCES * 3) + " " + "x" * 40
    reader, whole = TextReader(tokenizer, max_length=length, windowed=True), TextReader(tokenizer, max_length=4096)
    lengths = reader.windows(sample(text))
    made = [reader.tokenize(sample(text, window), DRAW) for window in range(len(lengths))]
    assert [len(tokens) for tokens in made] == lengths
    assert max(lengths) <= length
    for field in ("ids", "word"):
        body = torch.cat([tokens[field][1:-1] for tokens in made])
        assert torch.equal(body, whole.tokenize(sample(text), DRAW)[field][1:-1])
    for one, other in pairwise(made):
        if one["word"][-2] == other["word"][1]:
            assert len(one) == length and one["word"][1] == one["word"][-2], "only a word longer than a window is cut"
    assert all(tokens["position"][0] == 0 for tokens in made)


def test_windows_of_different_samples_are_not_confused():
    reader = TextReader("bytes", max_length=8, windowed=True)
    for text, key in (("first text here", "a"), ("other words there", "b"), ("first text here", "a")):
        assert bytes(reader.tokenize(sample(text, key=key), DRAW)["ids"][1:-1].tolist()) == text.encode()[:5]


def test_the_digest_tells_what_changes_lengths():
    digests = {
        TextReader(source, max_length=length, windowed=windowed).digest
        for source in ("bytes", word_pieces(), byte_pairs()) for length in (8, 9) for windowed in (False, True)
    }  # fmt: skip
    assert len(digests) == 12


def test_random_ids_leave_out_special_and_unused_ones():
    reader = TextReader(word_pieces())
    replace, names = reader.replacement(), reader.vocabulary.backend.id_to_token
    assert replace.mask_id == reader.vocabulary.mask and names(replace.mask_id) == "[MASK]"
    assert names(replace.random_ids[0]) == "'", "the first piece after the special and unused ones"
    assert replace.random_ids == (7, reader.vocabulary.size)
    assert (replace.mask, replace.random) == (0.8, 0.1)
    assert TextReader(byte_pairs()).replacement().random_ids[0] == 5
    assert TextReader("bytes").replacement().random_ids == (0, 256)


def test_a_tokenizer_without_the_special_tokens_is_refused_and_its_own_can_be_named():
    backend = word_pieces(special=("[UNK]", "<begin>", "<end>", "<hide>"))
    message = r"wanted \[CLS\], \[SEP\], \[MASK\] or <s>.*added tokens are \[UNK\], <begin>, <end>, <hide>; name three"
    with pytest.raises(ValueError, match=message):
        TextReader(backend)
    reader = TextReader(backend, specials=("<begin>", "<end>", "<hide>"))
    assert (reader.vocabulary.cls, reader.vocabulary.sep, reader.vocabulary.mask) == (1, 2, 3)
    with pytest.raises(ValueError, match="wanted <begin>, <ende>, <hide>"):
        TextReader(backend, specials=("<begin>", "<ende>", "<hide>"))


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ValueError, match=r'no tokenizer can be read from .*nowhere\.json.*wanted "bytes" or the path'):
        TextReader(tmp_path / "nowhere.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json of the tokenizers library"):
        TextReader(tmp_path)
    with pytest.raises(ValueError, match=r"max_length must be at least 3 .*got 2"):
        TextReader("bytes", max_length=2)


@pytest.mark.parametrize(
    ("data", "cause"),
    [(b"", "empty text"), (b" \n", "empty text"), (b"\xff\xfe", "not UTF-8"), (b"\x00", "empty text")],
)
def test_a_text_that_cannot_be_used_costs_its_sample(tokenizer, data, cause):
    with pytest.raises(BadMember) as caught:
        TextReader(tokenizer).tokenize(sample(data), DRAW)
    assert caught.value.cause == cause


def test_a_text_in_which_the_tokenizer_finds_nothing_costs_its_sample():
    with pytest.raises(BadMember, match="there is no text") as caught:
        TextReader(word_pieces()).tokenize(sample("\u00a0\u2003"), DRAW)
    assert caught.value.cause == "empty text"


def some_text(**more):
    torch.manual_seed(0)
    return Text(TextReader(word_pieces(), max_length=16), width=8, **more).eval()


def embed(text, tokens, replaced_N=None):
    nothing_N = torch.zeros(len(tokens), dtype=torch.bool)
    return text.embed(text.features(tokens), tokens, nothing_N if replaced_N is None else replaced_N)


def test_the_embedding_is_word_position_and_type_through_a_layer_norm():
    text = some_text(first_position=2)
    assert isinstance(text, Modality)
    tokens = Tokens.pack([text.reader.tokenize(sample(s), DRAW) for s in SENTENCES])
    x_ND = text.table.weight[tokens["ids"]] + text.positions.weight[tokens["position"] + 2] + text.types.weight[0]
    expected = F.layer_norm(x_ND, (8,), text.norm.weight, text.norm.bias, eps=1e-12)
    torch.testing.assert_close(embed(text, tokens), expected)
    assert text.positions.num_embeddings == 18


def test_a_hidden_token_is_the_mask_token_with_or_without_its_id_being_changed():
    text = some_text()
    tokens, index = text.reader.tokenize(sample(SENTENCES[0]), DRAW), torch.tensor([2, 4])
    by_id = text.reader.replacement(mask=1.0, random=0.0)(tokens, index, DRAW)
    by_mark = HideAll()(tokens, index, DRAW)
    assert not torch.equal(by_id.tokens["ids"], by_mark.tokens["ids"])
    shown = embed(text, by_id.tokens, by_id.replaced_N)
    torch.testing.assert_close(shown, embed(text, by_mark.tokens, by_mark.replaced_N))
    torch.testing.assert_close(shown, embed(text, by_id.tokens))


def test_too_few_positions_are_refused_when_the_module_is_made_and_when_rows_come():
    with pytest.raises(ValueError, match="512 tokens was given, positions reach to 64; give the reader max_length=64"):
        Text(TextReader("bytes"), width=8, positions=64)
    text = some_text()
    long = TextReader(word_pieces(), max_length=99).tokenize(sample(SENTENCES[0] * 3), DRAW)
    with pytest.raises(ValueError, match=f"a row of {len(long)} tokens was given, positions reach to 16"):
        embed(text, long)


def test_a_long_text_is_cut_once_for_all_its_windows(monkeypatch):
    reader, text = TextReader(word_pieces(), max_length=64, windowed=True), " ".join(SENTENCES * 300)
    cuts, cut = [], reader.vocabulary.cut
    monkeypatch.setattr(reader.vocabulary, "cut", lambda text: cuts.append(1) or cut(text))
    windows = len(reader.windows(sample(text)))
    for window in range(windows):
        reader.tokenize(sample(text, window), DRAW)
    assert windows > 50 and len(cuts) == 1


def test_five_characters_in_a_row_become_one_mask_anywhere_in_a_text():
    text, reader = SENTENCES[0], TextReader("bytes")
    erased, starts = ErasedText(reader), []
    for unit in range(2_000):
        tokens = erased.tokenize(sample(text), Draw.row(0, 0, 0, epoch=0, unit=unit))
        ids, (place,) = tokens["ids"].tolist(), (tokens.special_N == ERASED).nonzero()[:, 0].tolist()
        starts.append(place - 1)
        assert ids[place] == reader.vocabulary.mask and tokens["word"][place] == -1
        kept = bytes(ids[1:place]) + bytes(ids[place + 1 : -1])
        assert kept.decode() == text[: place - 1] + text[place + 4 :]
        word = tokens["word"].tolist()
        assert max(word[:place]) < min(word[place + 1 : -1], default=99), "the halves share no word"
    assert set(starts) == set(range(len(text) - 4))
    assert tokens["position"].tolist() == list(range(len(tokens)))


def test_short_texts_stay_whole_long_ones_are_cut_off_and_windows_are_refused(tokenizer):
    reader = TextReader(tokenizer, max_length=12)
    erased = pickle.loads(pickle.dumps(ErasedText(reader, length=5, least=21)))
    assert isinstance(erased, Reader)
    whole = erased.tokenize(sample(SENTENCES[2]), DRAW)
    assert torch.equal(whole["ids"], reader.tokenize(sample(SENTENCES[2]), DRAW)["ids"])
    lengths = [len(erased.tokenize(sample(SENTENCES[0]), Draw.row(0, 0, 0, epoch=0, unit=u))) for u in range(50)]
    assert max(lengths) == 12
    with pytest.raises(ValueError, match=r"wanted a reader that is not windowed .* got windowed=True, length 5"):
        ErasedText(TextReader(tokenizer, windowed=True))
    with pytest.raises(ValueError, match="1 <= length < least, got windowed=False, length 9 and least 9"):
        ErasedText(reader, length=9, least=9)


def test_one_of_two_views_may_read_with_a_reader_of_its_own():
    reader = TextReader("bytes")
    readers = {"text": reader}
    plain, other = View(), View(readers={"text": ErasedText(reader)})
    ids = [view.row(sample(SENTENCES[0]), readers, DRAW, None).seen["text"]["ids"] for view in (plain, other)]
    assert torch.equal(ids[0], reader.tokenize(sample(SENTENCES[0]), DRAW)["ids"])
    assert len(ids[1]) == len(ids[0]) - 4
