"""Rows as a page shows them: words as words, everything else as pictures, and where each token stands in a picture."""
# N tokens of one row, n by m an array of weights

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageChops
from torch import Tensor

from mmpre.data.sample import Sample
from mmpre.modality import Reader
from mmpre.show import Says, show_row
from mmpre.tokens import Tokens

QUALITY = 88  # of pictures, in WebP
HEAT = (43, 108, 176)  # of weights, over light and dark grounds
BROAD_PX = 500  # from which on a picture wants the whole line
FLAT_PX = 170  # from which on it wants the whole of half a line, where it is more than twice as wide as high
LONGEST = 60  # letters of a token that are shown
SPACE = "␣"  # where white space is all that a token is


@dataclass(frozen=True)
class Piece:
    """A token's letters. `gap` says that a space stands before it, `hidden` that it was picked."""

    text: str
    gap: bool
    hidden: bool
    special: bool


@dataclass(frozen=True)
class Drawn:
    """One role of a row: pieces of text, or else a picture with its size."""

    role: str
    pieces: Sequence[Piece] = ()
    picture: str = ""
    size: tuple[int, int] = (0, 0)

    @property
    def lettered(self) -> bool:
        """Whether tokens are single letters, such as bases, which stand in columns best."""
        plain = [piece for piece in self.pieces if not piece.special]
        return bool(plain) and all(len(piece.text) == 1 for piece in plain)

    @property
    def broad(self) -> bool:
        return self.size[0] > BROAD_PX

    @property
    def flat(self) -> bool:
        """Whether several stand better below than beside each other."""
        return self.broad or self.size[0] > max(FLAT_PX, 2 * self.size[1])


def draw(reader: Reader, role: str, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None) -> Drawn:
    """A row of one role, hidden tokens marked: as text where every token has letters, otherwise as a picture."""
    if isinstance(reader, Says) and all(reader.texts(tokens)):
        return Drawn(role, pieces(reader, tokens, hidden_N))
    picture = show_row(reader, tokens, hidden_N, sample)
    return Drawn(role, picture=data_url(picture), size=picture.size)


def in_little(reader: Reader, role: str, tokens: Tokens, sample: Sample | None) -> tuple[Drawn, list[int]]:
    """A row with nothing hidden, in little room, and the numbers of the tokens that are in it.

    Where most tokens have letters it is text, and those without any, such as the nodes of a graph, are left out.
    """
    nothing_N, every = torch.zeros(len(tokens), dtype=torch.bool), list(range(len(tokens)))
    if isinstance(reader, Says):
        kept = [i for i, text in enumerate(reader.texts(tokens)) if text]
        if 2 * len(kept) > len(tokens):
            made = pieces(reader, tokens, nothing_N)
            return Drawn(role, [made[i] for i in kept]), kept
    return draw(reader, role, tokens, nothing_N, sample), every


def pieces(reader: Says, tokens: Tokens, hidden_N: Bool[Tensor, "N"]) -> list[Piece]:
    """Each token's letters. A space that begins a word is the space before it; where it is hidden it has a sign."""
    texts, made = [letters(text) for text in reader.texts(tokens)], []
    every = zip(texts, _glued(tokens, texts), hidden_N.tolist(), tokens.special_N.tolist(), strict=True)
    for text, glued, hidden, special in every:
        if text == SPACE and not glued and not hidden:
            made.append(Piece(" ", False, False, special >= 0))
        else:
            made.append(Piece(text.removeprefix("##"), not glued and text != SPACE, hidden, special >= 0))
    return made


def boxes(reader: Reader, tokens: Tokens, sample: Sample | None) -> list[tuple[int, int, int, int] | None]:
    """Where each token stands in the row's picture: what changes in it when that token alone is hidden."""
    nothing_N = torch.zeros(len(tokens), dtype=torch.bool)
    plain, found = show_row(reader, tokens, nothing_N, sample), []
    for i in range(len(tokens)):
        hidden_N = nothing_N.clone()
        hidden_N[i] = True
        other = show_row(reader, tokens, hidden_N, sample)
        found.append(ImageChops.difference(plain, other).getbbox() if other.size == plain.size else None)
    return found


def data_url(picture: Image.Image) -> str:
    """A picture as part of a page."""
    file = io.BytesIO()
    picture.save(file, "WEBP", quality=QUALITY, method=4)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def heat(weight_nm: Float[np.ndarray, "n m"], *, most_px: int = 128) -> str:
    """Weights as a picture of one colour, clearer where they are smaller; large arrays are made smaller by means."""
    high = max(float(np.quantile(weight_nm, 0.995)), 1e-9)  # a few that stand out must not make all others pale
    share_nm = np.clip(weight_nm / high, 0, 1)
    alpha = Image.fromarray((share_nm * 255).astype(np.uint8), "L")
    if max(alpha.size) > most_px:
        alpha = alpha.resize([min(side, most_px) for side in alpha.size], Image.Resampling.BOX)
    picture = Image.new("RGBA", alpha.size, (*HEAT, 0))
    picture.putalpha(alpha)
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def letters(text: str) -> str:
    """What a token stands for, as can be seen: white space has signs of its own where there is nothing else."""
    text = text.replace("\n", "⏎").replace("\t", "⇥")
    text = SPACE if text == " " else text
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _glued(tokens: Tokens, texts: Sequence[str]) -> list[bool]:
    """Which tokens stand right after the one before: those of the same word, where tokens know their words."""
    if "word" in tokens.fields and len(tokens["word"]) == len(tokens):
        word = tokens["word"].tolist()
        return [False, *(a == b and b >= 0 for a, b in pairwise(word))]
    single = sum(len(text) == 1 for text in texts) > len(texts) / 2
    return [single and len(text) == 1 for text in texts]
