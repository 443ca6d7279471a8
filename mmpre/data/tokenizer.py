"""Train a tokenizer on the texts of shards, by the tokenizers library."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mmpre.aside import file_aside
from mmpre.data.index import open_shards
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import CorruptSample, ShardReader

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
KINDS = ("wordpiece", "bpe", "unigram", "letters")
Corpus = Callable[[Sample], Iterable[str]]


def train_tokenizer(
    shards: Sequence[str | Path], out: Path, *, kind: str = "wordpiece", vocab: int = 16_000, suffix: str = "txt",
    lowercase: bool = True, corpus: Corpus | None = None,
) -> Path:  # fmt: skip
    """Write a tokenizer.json trained on all texts of some shards, or on what `corpus` makes of each sample.

    `letters` are byte pairs of sequences without words (DNA), every letter as it is written. The same texts give the
    same file, except for unigram: the library does not repeat its training.
    Samples without a readable text are passed over. Raises ValueError where no text is left, or for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"tokenizer: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if vocab <= len(SPECIALS):
        raise ValueError(f"tokenizer: vocab must be more than the {len(SPECIALS)} special tokens, got {vocab}")
    normalizer = normalizers.Sequence([normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])])
    counted = [0]
    texts = _texts(shards, corpus or (lambda sample: [sample.text((suffix,))]), counted)
    if kind == "wordpiece":
        made = _wordpiece(texts, vocab, normalizer)
    else:
        made, trainer = _make(kind, vocab)
        if kind != "letters":
            made.normalizer = normalizer
        made.train_from_iterator(texts, trainer)
    if not counted[0]:
        raise ValueError(
            f"tokenizer: no sample of {', '.join(map(str, shards))} has a readable "
            + ("member of that modality" if corpus else f".{suffix}; name --suffix")
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with file_aside(out) as aside:
        made.save(str(aside))
    return out


def _wordpiece(texts: Iterable[str], vocab: int, normalizer: normalizers.Normalizer) -> tokenizers.Tokenizer:
    """Word pieces from byte-pair merges within words: the commonest pieces at the start of words and inside them.

    The library's own trainer numbers its pieces otherwise in every process.
    """
    splitter = pre_tokenizers.BertPreTokenizer()
    words: Counter[str] = Counter()
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    merged = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=["[UNK]"], show_progress=False)
    # each word as often as it counts would be slow; its logarithm keeps the order of the common merges
    merged.train_from_iterator((word for word in sorted(words) for _ in range(words[word].bit_length())), trainer)
    pieces: Counter[str] = Counter()
    for word in sorted(words):
        for place, piece in enumerate(merged.encode(word).tokens):
            pieces[piece if place == 0 else f"##{piece}"] += words[word]
    letters = sorted({c for word in words for c in word})
    spelled = [*letters, *(f"##{c}" for c in letters)]  # so that every word seen can be spelled
    common = sorted(pieces, key=lambda piece: (-pieces[piece], piece))
    chosen = list(dict.fromkeys([*SPECIALS, *spelled, *common]))[: max(vocab, len(SPECIALS) + len(spelled))]
    made = tokenizers.Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(chosen)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer, made.decoder = normalizer, splitter, decoders.WordPiece()
    made.add_special_tokens(SPECIALS)
    return made


def _make(kind: str, vocab: int) -> tuple[tokenizers.Tokenizer, trainers.Trainer]:
    if kind == "letters":
        made = tokenizers.Tokenizer(models.BPE())
        made.decoder = decoders.Fuse()
        return made, trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIALS, show_progress=False)
    if kind == "bpe":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        return made, trainers.BpeTrainer(
            vocab_size=vocab, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        )
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made, trainers.UnigramTrainer(
        vocab_size=vocab, special_tokens=SPECIALS, unk_token="[UNK]", show_progress=False
    )


def _texts(shards: Sequence[str | Path], corpus: Corpus, counted: list[int]) -> Iterator[str]:
    opened = open_shards(list(shards))
    reader = ShardReader(opened)
    for i in range(len(opened)):
        try:
            digest, key = opened.identity(i)
            for text in corpus(Sample(key, "", digest, reader.read(i))):
                counted[0] += 1
                yield text
        except (BadMember, CorruptSample):
            continue
