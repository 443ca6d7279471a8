"""Train a tokenizer on the texts of shards, by the tokenizers library."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from mmpre.data.index import open_shards
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import CorruptSample, ShardReader

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
KINDS = ("wordpiece", "bpe", "unigram")


def train_tokenizer(
    shards: Sequence[str | Path], out: Path, *, kind: str = "wordpiece", vocab: int = 16_000, suffix: str = "txt",
    lowercase: bool = True,
) -> Path:  # fmt: skip
    """Write a tokenizer.json trained on all texts of some shards; the same texts give the same file.

    Samples without a readable text are passed over. Raises ValueError where no text is left, or for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"tokenizer: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if vocab <= len(SPECIALS):
        raise ValueError(f"tokenizer: vocab must be more than the {len(SPECIALS)} special tokens, got {vocab}")
    made, trainer = _make(kind, vocab)
    steps = [normalizers.NFC(), *([normalizers.Lowercase()] if lowercase else [])]
    made.normalizer = normalizers.Sequence(steps)
    counted = [0]
    made.train_from_iterator(_texts(shards, suffix, counted), trainer)
    if not counted[0]:
        raise ValueError(
            f"tokenizer: no sample of {', '.join(map(str, shards))} has a readable .{suffix}; name --suffix"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.part")
    made.save(str(aside))
    os.replace(aside, out)
    return out


def _make(kind: str, vocab: int) -> tuple[tokenizers.Tokenizer, trainers.Trainer]:
    if kind == "wordpiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=100))
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        return made, trainers.WordPieceTrainer(vocab_size=vocab, special_tokens=SPECIALS, show_progress=False)
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


def _texts(shards: Sequence[str | Path], suffix: str, counted: list[int]) -> Iterator[str]:
    opened = open_shards(list(shards))
    reader = ShardReader(opened)
    for i in range(len(opened)):
        try:
            digest, key = opened.identity(i)
            text = Sample(key, "", digest, reader.read(i)).text((suffix,))
        except (BadMember, CorruptSample):
            continue
        counted[0] += 1
        yield text
