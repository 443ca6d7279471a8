"""Text as word pieces of any tokenizer.json, or as bytes, with BERT's embeddings.

Source: Devlin et al. 2018, arXiv:1810.04805; `first_position` is what RoBERTa (Liu et al. 2019, arXiv:1907.11692) adds.
"""
# N tokens of the packed batch, D model width, W words or pieces of one text (no special tokens)

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import tokenizers
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor, nn

from mmpre.data.sample import BadMember, Sample
from mmpre.data.vocabulary import open_vocabulary
from mmpre.draw import Draw
from mmpre.dropout import Dropout
from mmpre.labels import NONE, Label
from mmpre.lookup import vector
from mmpre.masking.corrupt import BertReplace
from mmpre.masking.units import first_of_unit
from mmpre.show import cells
from mmpre.tokens import Tokens

CLS, SEP, ERASED = 0, 1, 2  # kinds of special token, in Tokens.special_N
NAMES = ("[CLS]", "[SEP]", "[MASK]")  # of these kinds
CACHED_PIECES = 4 << 20  # of the texts a worker keeps cut, so that each window does not cut the whole text again


class TextReader:
    """Cuts a text into [CLS] pieces [SEP], at most `max_length` of them with the two.

    A longer text is cut off, or, where `windowed`, becomes several windows of whole words, each a row of its own. A
    sample that asks for shorter rows (`Sample.most`) gives one of the shorter windows of what the row would be.
    Fields: ids; word, the number of a piece's word in its text (-1 for CLS and SEP); position, counted from 0.
    """

    shortens = True

    def __init__(
        self,
        tokenizer: str | Path | tokenizers.Tokenizer = "bytes",
        *,
        max_length: int = 512,
        suffixes: Sequence[str] = ("txt",),
        windowed: bool = False,
        specials: Sequence[str] | None = None,
    ) -> None:
        if max_length < 3:
            raise ValueError(f"TextReader: max_length must be at least 3 (CLS, a piece, SEP), got {max_length}")
        self.vocabulary = open_vocabulary(tokenizer, specials)
        self.max_length, self.suffixes, self.windowed = max_length, tuple(suffixes), windowed
        self._cut: OrderedDict[tuple[str, str], tuple[Tensor, Tensor]] = OrderedDict()
        self._kept_pieces = 0  # in self._cut

    @property
    def digest(self) -> str:
        """Changes with everything that window lengths depend on."""
        return f"text {self.vocabulary.digest} {self.max_length} {self.windowed} {'|'.join(self.suffixes)}"

    def windows(self, sample: Sample) -> list[int]:
        """How many tokens each window of a sample has, CLS and SEP included."""
        ids_W, word_W = self._pieces(sample)
        return [end - start + 2 for start, end in self._bounds(word_W)] if self.windowed else [self._kept(ids_W) + 2]

    def tokenize(self, sample: Sample, draw: Draw) -> Tokens:
        ids_W, word_W = self._pieces(sample)
        start, end = self._bounds(word_W)[sample.window] if self.windowed else (0, self._kept(ids_W))
        if sample.most is not None and end - start + 2 > sample.most:
            bounds = self._bounds(word_W[start:end], max(3, sample.most))
            first, last = bounds[int(draw.uniform("shorter") * len(bounds))]
            start, end = start + first, start + last
        return self.row(ids_W[start:end], word_W[start:end])

    def made(self) -> dict[str, bytes]:
        """A text of one letter's words that fills a row."""
        most = words = self.max_length - 2
        while words > 1 and (pieces := len(self.vocabulary.cut(" ".join("a" * words))[0])) > most:
            words = min(words - 1, words * most // pieces + 1)
        return {self.suffixes[0]: " ".join("a" * words).encode()}

    def row(self, ids_W: Int[Tensor, "W"], word_W: Int[Tensor, "W"]) -> Tokens:
        """Pieces between CLS and SEP."""
        # put together in numpy: on rows as short as these, a call costs torch ten times as much
        ids_N, word_N, position_N, special_N = made_4N = np.full((4, len(ids_W) + 2), -1, dtype=np.int64)
        ids_N[0], ids_N[-1], ids_N[1:-1] = self.vocabulary.cls, self.vocabulary.sep, ids_W.numpy()
        word_N[1:-1] = word_W.numpy()
        position_N[:] = np.arange(len(position_N))
        special_N[0], special_N[-1] = CLS, SEP
        ids_N, word_N, position_N, special_N = torch.from_numpy(made_4N).unbind()
        return Tokens.of_row(special_N, ids=ids_N, word=word_N, position=position_N)

    def spans(self, sample: Sample) -> list[tuple[int, int]]:
        """For each token of a sample's row, which characters of its text it stands for; (0, 0) for CLS and SEP."""
        spans, (ids_W, word_W) = self.vocabulary.spans(sample.text(self.suffixes)), self._pieces(sample)
        start, end = self._bounds(word_W)[sample.window] if self.windowed else (0, self._kept(ids_W))
        return [(0, 0), *spans[start:end], (0, 0)]

    def texts(self, tokens: Tokens) -> list[str]:
        """What each token stands for, by itself."""
        return [
            NAMES[kind] if kind >= 0 else self.vocabulary.written([i])
            for i, kind in zip(tokens["ids"].tolist(), tokens.special_N.tolist(), strict=True)
        ]

    def show(self, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None = None) -> Image.Image:
        """A picture of a row: its words, those that are hidden marked."""
        ids, kinds = tokens["ids"].tolist(), tokens.special_N.tolist()
        first_N = first_of_unit(tokens, "word")
        starts_N = torch.ones(len(tokens), dtype=torch.bool)
        starts_N[1:] = (first_N[1:] != first_N[:-1]) | (hidden_N[1:] != hidden_N[:-1])
        starts = starts_N.nonzero().squeeze(1).tolist()
        said = [
            NAMES[kinds[a]] if kinds[a] >= 0 else self.vocabulary.written(ids[a:b])
            for a, b in pairwise([*starts, len(ids)])
        ]
        return cells(said, hidden_N[starts], special=tokens.special_N[starts] >= 0)[0]

    def replacement(self, mask: float = 0.8, random: float = 0.1) -> BertReplace:
        """BERT's corruption with this vocabulary's mask and its range of ordinary ids."""
        return BertReplace(mask_id=self.vocabulary.mask, random_ids=self.vocabulary.free, mask=mask, random=random)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_cut": OrderedDict(), "_kept_pieces": 0}

    def _kept(self, ids_W: Int[Tensor, "W"]) -> int:
        return min(len(ids_W), self.max_length - 2)

    def _bounds(self, word_W: Int[Tensor, "W"], most: int | None = None) -> list[tuple[int, int]]:
        """Windows as full as whole words allow; only a word longer than a window is cut."""
        bounds, start, words = [], 0, word_W.numpy()
        while start < len(words):
            end = start + (self.max_length if most is None else most) - 2
            if end < len(words):
                first = end
                while first > start and words[first - 1] == words[end]:
                    first -= 1
                end = first if first > start else end
            end = min(end, len(words))
            bounds.append((start, end))
            start = end
        return bounds

    def _pieces(self, sample: Sample) -> tuple[Int[Tensor, "W"], Int[Tensor, "W"]]:
        """The pieces of the whole text; windows of a text come near each other in the data's order, so it is kept."""
        if not self.windowed:
            return self._cut_text(sample)
        name = (sample.digest, sample.key)
        if name not in self._cut:
            pieces = self._cut_text(sample)
            if len(pieces[0]) + 2 <= self.max_length:
                return pieces  # a single window: no other one comes
            self._cut[name] = pieces
            self._kept_pieces += len(pieces[0])
            while self._kept_pieces > CACHED_PIECES and len(self._cut) > 1:
                self._kept_pieces -= len(self._cut.popitem(last=False)[1][0])
        self._cut.move_to_end(name)
        return self._cut[name]

    def _cut_text(self, sample: Sample) -> tuple[Int[Tensor, "W"], Int[Tensor, "W"]]:
        text = sample.text(self.suffixes)
        ids_W, word_W = self.vocabulary.cut(text)
        if not len(ids_W):
            detail = f"the tokenizer finds no piece in {text[:40]!r}"
            raise BadMember("empty text", sample.bytes(self.suffixes)[0], detail)
        return ids_W, word_W


@dataclass(frozen=True)
class ErasedText:
    """Reads a text of which `length` neighbouring characters, anywhere, have become one mask token.

    The two halves are cut into pieces each for itself. Texts of fewer than `least` characters stay whole. The mask is
    a token of its own kind, ERASED, that no mask picks. For one of two views: `View(readers={"text": ...})`.
    Source: random span masking of Mirror-BERT, Liu et al. 2021, arXiv:2104.08027. Where the characters occur more than
    once, the authors' code erases the first of them instead.
    """

    reader: TextReader
    length: int = 5
    least: int = 30

    def __post_init__(self) -> None:
        if self.reader.windowed or not 1 <= self.length < self.least:
            raise ValueError(
                "ErasedText: wanted a reader that is not windowed and 1 <= length < least, got windowed="
                f"{self.reader.windowed}, length {self.length} and least {self.least}"
            )

    @property
    def suffixes(self) -> tuple[str, ...]:
        return self.reader.suffixes

    def made(self) -> dict[str, bytes]:
        return self.reader.made()

    def tokenize(self, sample: Sample, draw: Draw) -> Tokens:
        text, vocabulary = sample.text(self.suffixes), self.reader.vocabulary
        if len(text) < self.least:
            return self.reader.tokenize(sample, draw)
        start = int(draw.uniform("erase") * (len(text) - self.length + 1))
        nothing = torch.empty(0, dtype=torch.int32)
        halves = text[:start], text[start + self.length :]
        (before_W, word_W), (after_W, later_W) = (
            vocabulary.cut(half) if half else (nothing, nothing) for half in halves
        )
        if not len(before_W) + len(after_W):  # all that a tokenizer sees would be gone
            return self.reader.tokenize(sample, draw)
        first = int(word_W.max()) + 1 if len(word_W) else 0
        later_W = torch.where(later_W < 0, later_W, later_W + first)
        most = self.reader.max_length - 2
        mask_1 = torch.tensor([vocabulary.mask])
        ids_W = torch.cat([before_W, mask_1, after_W])[:most]
        tokens = self.reader.row(ids_W, torch.cat([word_W, torch.tensor([-1]), later_W])[:most])
        if len(before_W) < most:
            tokens.special_N[1 + len(before_W)] = ERASED
        return tokens

    def show(self, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None = None) -> Image.Image:
        return self.reader.show(tokens, hidden_N, sample)


@dataclass(frozen=True)
class Questions:
    """Reads, for a share of the rows, another text of the sample where it has one: a question in place of a caption.

    Which rows these are is drawn once a row, so `answer`, as a label of the same view, is that of the question read:
    `View(readers={"text": questions}, labels={"answer": questions.answer})`. `reader` reads captions.
    """

    reader: TextReader
    label: Label
    share: float
    suffixes_asked: tuple[str, ...] = ("question.txt",)

    def __post_init__(self) -> None:
        if self.reader.windowed or not 0 <= self.share <= 1:
            raise ValueError(
                "Questions: wanted a reader that is not windowed and a share from 0 to 1, got windowed="
                f"{self.reader.windowed} and a share of {self.share}; a third is 0.33"
            )

    @property
    def suffixes(self) -> tuple[str, ...]:
        return (*self.reader.suffixes, *self.suffixes_asked)

    def made(self) -> dict[str, bytes]:
        return self.reader.made()

    def tokenize(self, sample: Sample, draw: Draw) -> Tokens:
        if not self.asks(sample, draw):
            return self.reader.tokenize(sample, draw)
        most = self.reader.max_length - 2
        ids_W, word_W = self.reader.vocabulary.cut(sample.text(self.suffixes_asked))
        return self.reader.row(ids_W[:most], word_W[:most])

    def asks(self, sample: Sample, draw: Draw) -> bool:
        """Whether a row of the sample shows its question."""
        there = any(suffix in sample.members for suffix in self.suffixes_asked)
        return there and draw.whole().uniform("question") < self.share

    def answer(self, sample: Sample, draw: Draw) -> int:
        """The answer's number where the row shows a question that has one."""
        return self.label(sample, draw) if self.asks(sample, draw) else NONE

    def show(self, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None = None) -> Image.Image:
        return self.reader.show(tokens, hidden_N, sample)


def plain_reader(sample: Sample) -> TextReader:
    """A reader of ordinary settings, for `mmpre data inspect`."""
    return TextReader("bytes")


class Text(nn.Module):
    """Dropout(LayerNorm(word + position + type 0)).

    `table` (the word vectors) and `types` may be shared with heads and other modalities. `positions` is the longest
    row, by default the reader's, and 0 for none, where the encoder tells places by itself (ALiBi, rotary);
    `first_position` is the row of the position table that position 0 uses (RoBERTa: 2). The table of words has a
    multiple of `multiple` rows, the last ones unused: some matrix products are faster so. `types` is 0 where nothing
    tells types apart. `norm` is LayerNorm unless given.
    """

    def __init__(
        self,
        reader: TextReader,
        *,
        width: int,
        positions: int | None = None,
        first_position: int = 0,
        types: int = 2,
        multiple: int = 1,
        dropout: float = 0.1,
        eps: float = 1e-12,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.reader = reader
        self.longest = reader.max_length if positions is None else positions
        self._check_length(reader.max_length)
        self.first_position = first_position
        self.table = nn.Embedding(math.ceil(reader.vocabulary.size / multiple) * multiple, width)
        self.positions = nn.Embedding(self.longest + first_position, width) if self.longest else None
        self.types = nn.Embedding(types, width) if types else None
        self.norm = nn.LayerNorm(width, eps=eps) if norm is None else norm
        self.dropout = Dropout(dropout)
        for table in (self.table, self.positions, self.types):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)

    def features(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        """The word vectors."""
        return self.table(tokens["ids"])

    def embed(self, f_NE: Float[Tensor, "N D"], tokens: Tokens, replaced_N: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """A token marked as replaced is the mask token, whatever its id; BertReplace's random ids are not marked."""
        self._check_length(int(tokens.lengths_B.max()) if len(tokens.lengths_B) else 0)
        x_ND = torch.where(replaced_N[:, None], vector(self.table, self.reader.vocabulary.mask), f_NE)
        if self.positions is not None:
            x_ND = x_ND + self.positions(tokens["position"] + self.first_position)
        if self.types is not None:
            x_ND = x_ND + self.types.weight[0]
        return self.dropout(self.norm(x_ND))

    def _check_length(self, length: int) -> None:
        if 0 < self.longest < length:
            raise ValueError(
                f"Text: a row of {length} tokens was given, positions reach to {self.longest}; "
                f"give the reader max_length={self.longest} or fewer, or Text more positions"
            )
