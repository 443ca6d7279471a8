"""DNA from FASTA members: windows of a sequence as bases, k-mers or learned pieces.

Source: single bases as in HyenaDNA (arXiv:2306.15794) and MergeDNA (arXiv:2511.14806); overlapping k-mers as in DNABERT
(Ji et al. 2021); k-mers side by side as in the Nucleotide Transformer (Dalla-Torre et al. 2023); byte-pair pieces as in
DNABERT-2 (arXiv:2306.15006).
"""
# N tokens of the packed batch, L bases of a window, W pieces of a window (no special tokens), D model width

import copy
import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image
from torch import Tensor, nn

from mmpre.data.bases import LETTERS, LOWER, UNKNOWN, codes_of, letters_of, reverse_complement
from mmpre.data.fasta import SUFFIXES, read_fasta
from mmpre.data.sample import BadMember, Sample
from mmpre.draw import Draw
from mmpre.lookup import vector
from mmpre.masking.corrupt import BertReplace
from mmpre.show import cells
from mmpre.tokens import Tokens

CLS, SEP = 0, 1  # kinds of special token, in Tokens.special_N
CACHED_BASES = 64 << 20  # of the sequences that a worker keeps, so that each window does not parse its whole member
CORPUS_BASES = 512  # of the texts that a tokenizer is trained on
COLOURS = {"A": "#b5dfa8", "C": "#b3cdf0", "G": "#f3dd9b", "T": "#efc3c3"}  # of bases, in pictures

Cut = tuple[Int64[np.ndarray, "W"], Int64[np.ndarray, "W"], Int64[np.ndarray, "W"]]


class Cutter(Protocol):
    """What cuts bases into pieces. `free` bounds the ids (first, last + 1) that a random replacement may take."""

    size: int
    cls: int
    sep: int
    mask: int
    free: tuple[int, int]
    digest: str

    def cut(self, code_L: UInt8[np.ndarray, "L"]) -> Cut:
        """Ids of the pieces of an upper-case sequence, and the bases they stand for (first, last + 1)."""
        ...

    def letters(self, ids: Sequence[int]) -> str:
        """The sequence that pieces stand for."""
        ...


class Bases:
    """Every base is a piece. What merges bases later, in the model, starts from these."""

    size, cls, sep, mask, free, digest = 8, 5, 6, 7, (0, 4), "bases"

    def cut(self, code_L: UInt8[np.ndarray, "L"]) -> Cut:
        place_L = np.arange(len(code_L))
        return code_L.astype(np.int64), place_L, place_L + 1

    def letters(self, ids: Sequence[int]) -> str:
        return "".join(LETTERS[i] for i in ids)


class Kmers:
    """Words of k bases, side by side or, with `overlap`, one from every base on.

    Side by side, bases next to an N or at the end that fill no word are pieces of their own, and so is N. With
    `overlap` a word that holds an N is N (so a base between two near Ns is lost), and fewer than k bases are single. A
    word hidden alone can then be read from its neighbours: hide spans of k words or more (`StartedSpans`). A span of k
    hides one base, each further word one more.
    """

    def __init__(self, k: int = 6, *, overlap: bool = False) -> None:
        if not 2 <= k <= 10:
            raise ValueError(f"Kmers: k must lie between 2 and 10, got {k}; use Bases for single ones")
        self.k, self.overlap, self.words = k, overlap, 4**k
        self.cls, self.sep, self.mask = (self.words + len(LETTERS) + i for i in range(3))
        self.size, self.free = self.words + len(LETTERS) + 3, (0, self.words)
        self.digest = f"{k}-mers{' overlap' if overlap else ''}"

    def cut(self, code_L: UInt8[np.ndarray, "L"]) -> Cut:
        k, length = self.k, len(code_L)
        if length < k:
            place_L = np.arange(length)
            return self.words + code_L.astype(np.int64), place_L, place_L + 1
        word_S = np.zeros(length - k + 1, dtype=np.int64)
        for i in range(k):
            word_S = 4 * word_S + np.minimum(code_L[i : length - k + 1 + i], 3)
        unknown = np.flatnonzero(code_L == UNKNOWN)
        if self.overlap:
            for i in range(k):
                with_n = unknown - i
                word_S[with_n[(with_n >= 0) & (with_n < len(word_S))]] = self.words + UNKNOWN
            first_W = np.arange(len(word_S))
            return word_S, first_W, first_W + k
        is_first_L = np.zeros(length, dtype=bool)
        is_word_L = np.zeros(length, dtype=bool)
        for start, end in zip(np.r_[0, unknown + 1], np.r_[unknown, length], strict=True):
            words_end = start + (end - start) // k * k
            is_word_L[start:words_end:k] = True
            is_first_L[words_end:end] = True
        is_first_L |= is_word_L | (code_L == UNKNOWN)
        first_W = np.flatnonzero(is_first_L)
        ids_W = self.words + code_L[first_W].astype(np.int64)
        ids_W[is_word_L[first_W]] = word_S[first_W[is_word_L[first_W]]]
        return ids_W, first_W, np.r_[first_W[1:], length]

    def letters(self, ids: Sequence[int]) -> str:
        pieces = [self._piece(i) for i in ids]
        if not self.overlap or any(i >= self.words and i != self.words + UNKNOWN for i in ids):
            return "".join(pieces)  # single bases are from fewer than k
        whole = ["N"] * (len(pieces) + self.k - 1)
        for place, piece in enumerate(pieces):
            if len(piece) == self.k:
                whole[place : place + self.k] = piece
        return "".join(whole)

    def _piece(self, i: int) -> str:
        if i >= self.words:
            return LETTERS[i - self.words]
        return "".join(LETTERS[i >> shift & 3] for shift in range(2 * self.k - 2, -1, -2))


class Pieces:
    """Learned pieces, of a tokenizer.json (`mmpre data tokenizer ... --kind letters --modality dna`)."""

    def __init__(self, path: str | Path) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # one window at a time, and workers are forked
        try:
            self._load(Path(path).read_text(encoding="utf-8"))
        except Exception as e:  # the library raises plain Exception
            raise ValueError(f"Pieces: no tokenizer.json can be read from {path} ({e})") from None
        ids = self.backend.get_vocab()
        missing = [name for name in ("[CLS]", "[SEP]", "[MASK]", *LETTERS) if name not in ids]
        if missing:
            raise ValueError(
                f"Pieces: {path} lacks {', '.join(missing)}; train one on DNA: mmpre data tokenizer SHARDS "
                "--kind letters --modality dna --out tokenizer.json"
            )
        self.cls, self.sep, self.mask = ids["[CLS]"], ids["[SEP]"], ids["[MASK]"]
        self.size, self.free = max(ids.values()) + 1, (min(ids[letter] for letter in LETTERS), max(ids.values()) + 1)
        self.digest = hashlib.blake2b(self.source.encode(), digest_size=16).hexdigest()

    def cut(self, code_L: UInt8[np.ndarray, "L"]) -> Cut:
        made = self.backend.encode(letters_of(code_L), add_special_tokens=False)
        place_W2 = np.array(made.offsets, dtype=np.int64).reshape(-1, 2)
        return np.array(made.ids, dtype=np.int64), place_W2[:, 0], place_W2[:, 1]

    def letters(self, ids: Sequence[int]) -> str:
        return "".join(self.backend.id_to_token(int(i)) for i in ids)

    def _load(self, source: str) -> None:
        self.source, self.backend = source, tokenizers.Tokenizer.from_str(source)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "backend"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._load(self.source)


@dataclass(frozen=True)
class _Windows:
    """A member's bases, its records one after the other, and where its windows begin and end among them."""

    code: UInt8[np.ndarray, "_"]
    start: Int64[np.ndarray, "windows"]
    end: Int64[np.ndarray, "windows"]
    names: Sequence[str]
    record_end: Int64[np.ndarray, "records"]


class DnaReader:
    """Cuts each record of a FASTA member into windows of `length` bases, one every `stride`, as [CLS] pieces [SEP].

    The last window of a record ends where the record does. Windows of which more than the share `most_n` is N are left
    out; a member of nothing else raises BadMember. With the chance `reverse` a row is the other strand of its window:
    0.5 is augmentation, 1 a view of its own. `ends=False` leaves [CLS] and [SEP] out.
    Fields, one entry a token: ids; position, counted from 0; base, the first base in the window that it stands for (-1
    for special ones); lower, how many of its bases are lower case (repeats, in most genomes).
    """

    windowed = True

    def __init__(
        self, cutter: Cutter | None = None, *, length: int = 1024, stride: int | None = None, most_n: float = 0.5,
        reverse: float = 0.0, ends: bool = True, suffixes: Sequence[str] = SUFFIXES,
    ) -> None:  # fmt: skip
        stride = length if stride is None else stride
        if not 1 <= stride <= length:
            raise ValueError(
                f"DnaReader: stride must lie between 1 and length, or bases between windows are lost; got "
                f"stride {stride} and length {length}"
            )
        if not 0 <= most_n <= 1 or not 0 <= reverse <= 1:
            raise ValueError(f"DnaReader: most_n and reverse are shares, 0 to 1; got {most_n} and {reverse}")
        self.cutter = Bases() if cutter is None else cutter
        self.length, self.stride, self.most_n, self.reverse, self.ends = length, stride, most_n, reverse, ends
        self.suffixes = tuple(suffixes)
        self._kept: OrderedDict[tuple[str, str], _Windows] = OrderedDict()

    @property
    def digest(self) -> str:
        """Changes with everything that windows and their lengths depend on."""
        numbers = f"{self.length} {self.stride} {self.most_n} {self.ends}"
        return f"dna {self.cutter.digest} {numbers} {'|'.join(self.suffixes)}"

    @property
    def longest(self) -> int:
        return self.length + 2 * self.ends

    def windows(self, sample: Sample) -> list[int]:
        """How many tokens each window has."""
        made = self._windows(sample)
        upper = made.code & ~np.uint8(LOWER)
        bounds = zip(made.start.tolist(), made.end.tolist(), strict=True)
        return [len(self.cutter.cut(upper[a:b])[0]) + 2 * self.ends for a, b in bounds]

    def tokenize(self, sample: Sample, draw: Draw) -> Tokens:
        made = self._windows(sample)
        code_L = made.code[made.start[sample.window] : made.end[sample.window]]
        if self.reverse and draw.uniform("reverse") < self.reverse:
            code_L = reverse_complement(code_L)
        ids_W, first_W, last_W = self.cutter.cut(code_L & ~np.uint8(LOWER))
        lower_L = np.r_[0, np.cumsum(code_L >= LOWER)]
        special_N = self._between(CLS, np.full_like(ids_W, -1), SEP)
        return Tokens.of_row(
            special_N, ids=self._between(self.cutter.cls, ids_W, self.cutter.sep), base=self._between(-1, first_W, -1),
            lower=self._between(0, lower_L[last_W] - lower_L[first_W], 0), position=torch.arange(len(special_N)),
        )  # fmt: skip

    def still(self) -> "DnaReader":
        """The same without chance: each window as it stands, unless all are turned."""
        made = copy.copy(self)
        made.reverse = float(self.reverse == 1)
        return made

    def made(self) -> dict[str, bytes]:
        """A record of one window."""
        return {self.suffixes[0]: b">made\n" + (b"ACGT" * (self.length // 4 + 1))[: self.length]}

    def place(self, sample: Sample) -> tuple[str, int, int]:
        """Where a sample's window stands: the record's name, and the bases of it (first, last + 1)."""
        made = self._windows(sample)
        start, end = int(made.start[sample.window]), int(made.end[sample.window])
        record = int(np.searchsorted(made.record_end, start, side="right"))
        before = int(made.record_end[record - 1]) if record else 0
        return made.names[record], start - before, end - before

    def letters(self, tokens: Tokens) -> str:
        """The sequence that a row's tokens stand for, in upper case."""
        return self.cutter.letters(tokens["ids"][tokens.special_N < 0].tolist())

    def texts(self, tokens: Tokens) -> list[str]:
        """The letters of each token; a prediction may be a special one."""
        named = {self.cutter.cls: "[CLS]", self.cutter.sep: "[SEP]", self.cutter.mask: "[MASK]"}
        return [named.get(i) or self.cutter.letters([i]) for i in tokens["ids"].tolist()]

    def show(self, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None = None) -> Image.Image:
        """A picture of a row: its pieces, single bases on their colours, hidden ones marked."""
        said = self.texts(tokens)
        grounds = [COLOURS.get(text) for text in said]
        return cells(said, hidden_N, special=tokens.special_N >= 0, colours=grounds, gap_px=1)[0]

    def replacement(self, mask: float = 0.8, random: float = 0.1) -> BertReplace:
        """BERT's corruption with this cutter's mask and its range of ordinary ids."""
        return BertReplace(mask_id=self.cutter.mask, random_ids=self.cutter.free, mask=mask, random=random)

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_kept": OrderedDict()}

    def _between(self, first: int, values_W: Int64[np.ndarray, "W"], last: int) -> Int64[Tensor, "N"]:
        return torch.from_numpy(np.r_[first, values_W, last] if self.ends else np.ascontiguousarray(values_W))

    def _windows(self, sample: Sample) -> _Windows:
        name = (sample.digest, sample.key)
        if name not in self._kept:
            self._kept[name] = self._read(sample)
            while sum(len(one.code) for one in self._kept.values()) > CACHED_BASES and len(self._kept) > 1:
                self._kept.popitem(last=False)
        self._kept.move_to_end(name)
        return self._kept[name]

    def _read(self, sample: Sample) -> _Windows:
        names, letters = read_fasta(sample, self.suffixes)
        suffix = sample.bytes(self.suffixes)[0]
        code = codes_of(b"".join(letters), suffix)
        size_R = np.array([len(one) for one in letters], dtype=np.int64)
        count_R = np.where(size_R, 1 + -(-np.maximum(size_R - self.length, 0) // self.stride), 0)
        record_W = np.repeat(np.arange(len(size_R)), count_R)
        number_W = np.arange(len(record_W)) - np.repeat(count_R.cumsum() - count_R, count_R)
        end_R = size_R.cumsum()
        start_W = (end_R - size_R)[record_W] + number_W * self.stride
        end_W = np.minimum(start_W + self.length, end_R[record_W])
        some_W = _count(code & ~np.uint8(LOWER) == UNKNOWN, start_W, end_W) <= self.most_n * (end_W - start_W)
        if not some_W.any():
            share = f"more than {self.most_n:.0%} of each of its {len(some_W)} windows is N"
            raise BadMember("only N", suffix, share)
        return _Windows(code, start_W[some_W], end_W[some_W], names, end_R)


def _count(true: Bool[np.ndarray, "_"], start_W: np.ndarray, end_W: np.ndarray) -> np.ndarray:
    """How many are true in each window, from the borders of runs alone."""
    edge = np.flatnonzero(np.diff(true, prepend=False, append=False))
    run = np.stack([np.zeros(len(edge) // 2, dtype=np.int64), edge[1::2] - edge[::2]], 1).ravel().cumsum()
    if not len(edge):
        return np.zeros(len(start_W))
    return np.interp(end_W, edge, run) - np.interp(start_W, edge, run)


def plain_reader(sample: Sample) -> DnaReader:
    """A reader of ordinary settings, for `mmpre data inspect`."""
    return DnaReader(length=512)


def corpus(sample: Sample) -> Iterator[str]:
    """Texts to train a tokenizer on: pieces of a sample's sequences, upper case, without N."""
    _, records = read_fasta(sample)
    yield from LETTERS  # so that each is a piece, whatever the sequences hold
    for letters in records:
        for stretch in letters_of(codes_of(letters, "FASTA")).upper().split("N"):
            yield from (stretch[i : i + CORPUS_BASES] for i in range(0, len(stretch), CORPUS_BASES))


class Dna(nn.Module):
    """A vector for each piece, that of the mask for a replaced token, and one for the position where `positions`."""

    def __init__(self, reader: DnaReader, *, width: int, positions: bool = False) -> None:
        super().__init__()
        self.reader = reader
        self.table = nn.Embedding(reader.cutter.size, width)
        self.positions = nn.Embedding(reader.longest, width) if positions else None
        for table in (self.table, *([self.positions] if positions else [])):
            nn.init.normal_(table.weight, std=0.02)

    def features(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        return self.table(tokens["ids"])

    def embed(self, f_NE: Float[Tensor, "N D"], tokens: Tokens, replaced_N: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        x_ND = torch.where(replaced_N[:, None], vector(self.table, self.reader.cutter.mask), f_NE)
        return x_ND if self.positions is None else x_ND + self.positions(tokens["position"])
