"""What cuts a text into pieces: any tokenizer.json, or bytes."""
# W words or pieces of one text (no special tokens)

import hashlib
import os
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import tokenizers
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from mmpre.data.words import Words, apart


@runtime_checkable
class Vocabulary(Protocol):
    """What cuts a text into pieces. `free` bounds the ids (first, last + 1) that a random replacement may take."""

    size: int
    cls: int
    sep: int
    mask: int
    free: tuple[int, int]
    digest: str

    def cut(self, text: str) -> tuple[Int[Tensor, "W"], Int[Tensor, "W"]]:
        """Ids of the pieces, and for each piece the number of its word."""
        ...

    def cut_words(self, words: Sequence[str]) -> tuple[Int[Tensor, "W"], Int[Tensor, "W"]]:
        """The same of a text that is cut into words already, which stand with a space between them."""
        ...

    def spans(self, text: str) -> list[tuple[int, int]]:
        """For each piece, which characters of the text it stands for (first, last + 1)."""
        ...

    def written(self, ids: Sequence[int]) -> str:
        """What neighbouring pieces stand for, to be looked at."""
        ...


class Bytes:
    """UTF-8 bytes; a word is what follows white space, with the space before it. Needs no file."""

    size, cls, sep, mask, free, digest = 259, 256, 257, 258, (0, 256), "bytes"

    def cut(self, text: str) -> tuple[Int[Tensor, "W"], Int[Tensor, "W"]]:
        ids_W = _uint8(text.encode())
        space_W = (ids_W == 32) | ((ids_W >= 9) & (ids_W <= 13))
        starts_W = space_W.clone()
        starts_W[1:] &= ~space_W[:-1]
        return ids_W.int(), starts_W.cumsum(0, dtype=torch.int32)

    def cut_words(self, words: Sequence[str]) -> tuple[Int[Tensor, "W"], Int[Tensor, "W"]]:
        cut = [f"{' ' if i else ''}{word}".encode() for i, word in enumerate(words)]
        count_S = torch.tensor([len(one) for one in cut], dtype=torch.int64)
        word_W = torch.repeat_interleave(torch.arange(len(cut), dtype=torch.int32), count_S)
        return _uint8(b"".join(cut)).int(), word_W

    def spans(self, text: str) -> list[tuple[int, int]]:
        return [(i, i + 1) for i, c in enumerate(text) for _ in c.encode()]

    def written(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")


def _uint8(data: bytes) -> UInt8[Tensor, "_"]:
    return torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))  # torch.frombuffer refuses what is empty


class Pieces:
    """The pieces of a tokenizer.json; its own padding, truncation and template are not used."""

    def __init__(self, source: str, name: str, specials: Sequence[str] | None) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one text at a time, and workers are forked
        self.source, self.name, self.specials = source, name, specials
        try:
            self.backend = tokenizers.Tokenizer.from_str(source)
        except Exception as e:  # the library raises plain Exception
            raise ValueError(f"tokenizer: {name} is not a tokenizer.json of the tokenizers library ({e})") from None
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True  # a text that says "[MASK]" holds six characters, not a mask
        ids = self.backend.get_vocab(with_added_tokens=True)
        self.size = max(ids.values()) + 1
        self.cls, self.sep, self.mask = self._find_specials(ids)
        self.free = self._longest_free_run(ids)
        self.digest = hashlib.blake2b(f"{source}{specials}".encode(), digest_size=16).hexdigest()
        self.words = Words(self.backend) if apart(source) else None

    def cut(self, text: str) -> tuple[Int[Tensor, "W"], Int[Tensor, "W"]]:
        if self.words is None:
            return self._numbers(self.backend.encode(text, add_special_tokens=False))
        ids_W, size_w = self.words.cut(text)
        return torch.from_numpy(ids_W), torch.from_numpy(np.arange(len(size_w), dtype=np.int32).repeat(size_w))

    def cut_words(self, words: Sequence[str]) -> tuple[Int[Tensor, "W"], Int[Tensor, "W"]]:
        spaced = [f"{' ' if i else ''}{word}" for i, word in enumerate(words)]
        return self._numbers(self.backend.encode(spaced, is_pretokenized=True, add_special_tokens=False))

    def spans(self, text: str) -> list[tuple[int, int]]:
        return self.backend.encode(text, add_special_tokens=False).offsets

    def written(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def __reduce__(self) -> tuple[type, tuple]:
        return Pieces, (self.source, self.name, self.specials)

    def _numbers(self, made: tokenizers.Encoding) -> tuple[Int[Tensor, "W"], Int[Tensor, "W"]]:
        words = [-1 if word is None else word for word in made.word_ids]
        ids_W, word_W = (np.array(numbers, dtype=np.int32) for numbers in (made.ids, words))  # faster than torch.tensor
        return torch.from_numpy(ids_W), torch.from_numpy(word_W)

    def _find_specials(self, ids: dict[str, int]) -> tuple[int, int, int]:
        choices = [self.specials] if self.specials else [("[CLS]", "[SEP]", "[MASK]"), ("<s>", "</s>", "<mask>")]
        for names in choices:
            if len(names) == 3 and all(name in ids for name in names):
                return tuple(ids[name] for name in names)
        wanted = " or ".join(", ".join(names) for names in choices)
        have = ", ".join(token.content for token in self.backend.get_added_tokens_decoder().values()) or "none"
        raise ValueError(
            f"tokenizer: {self.name} lacks special tokens: wanted {wanted} (begin, end, mask), its added tokens are "
            f"{have}; name three of its own by specials=(begin, end, mask), or add them with the tokenizers library's "
            "add_special_tokens and save the file again"
        )

    def _longest_free_run(self, ids: dict[str, int]) -> tuple[int, int]:
        """The longest run of ids without special or unused ones; for BERT's vocabularies it begins at "!"."""
        taken = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        taken |= {i for name, i in ids.items() if re.fullmatch(r"\[unused\d+\]", name)}
        edges = [-1, *sorted(taken | {self.cls, self.sep, self.mask}), self.size]
        _, before, after = max((b - a, a, b) for a, b in pairwise(edges))
        if after - before < 2:
            raise ValueError(f"tokenizer: {self.name} has no piece that is not special ({self.size} ids); train it")
        return before + 1, after


def open_vocabulary(tokenizer: str | Path | tokenizers.Tokenizer, specials: Sequence[str] | None) -> Vocabulary:
    """ "bytes", the path of a tokenizer.json or of a folder that holds one, or a tokenizer that is loaded already."""
    if isinstance(tokenizer, tokenizers.Tokenizer):
        return Pieces(tokenizer.to_str(), "the tokenizer", specials)
    if tokenizer == "bytes":
        return Bytes()
    path = Path(tokenizer)
    path = path / "tokenizer.json" if path.is_dir() else path
    try:
        return Pieces(path.read_text(encoding="utf-8"), str(path), specials)
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(
            f"tokenizer: no tokenizer can be read from {tokenizer} ({e}); "
            'wanted "bytes" or the path of a tokenizer.json'
        ) from None
