"""Pictures of rows: what there is, and what a mask hides of it.

A reader may have a method of its own, which an outside modality writes in its one file:

    def show(self, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None = None) -> Image.Image

`tokens` are those of one row and `hidden_N` marks the ones to show as hidden. To show what was predicted, put it into
the tokens' fields (`tokens.with_values(ids=...)`) and hide nothing. `sample` is there for what tokens do not hold, such
as the picture behind regions; without it the method does with the tokens alone. A reader without the method gets a
strip of numbered cells.

A reader of tokens that have letters also has `texts(tokens) -> list[str]`, what each of a row's tokens stands for (""
for one without letters): a report then says what was hidden and what it was taken for, and shows rows of which every
token has letters as text. And a modality whose predictions are values (pixels, bands) has
`restored(tokens, f_NE) -> Tokens`, the tokens that have these clean features, the inverse of its `features`.
"""
# N tokens of one row, E values of a token's clean features

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mmpre.data.sample import Sample
from mmpre.data.tar import printable
from mmpre.modality import Reader
from mmpre.tokens import Tokens

INK, PAPER, HIDDEN, SPECIAL = "#1b1b1b", "#ffffff", "#b3261e", "#9a9a9a"
GREY = 128  # of what is hidden in a picture
WIDTH_PX, SIZE_PX, LONGEST = 960, 15, 40  # of a picture, of letters, and characters of a cell
Box = tuple[int, int, int, int]


@runtime_checkable
class Shows(Protocol):
    """A reader that draws its own rows."""

    def show(self, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None = None) -> Image.Image: ...


@runtime_checkable
class Says(Protocol):
    """A reader whose tokens stand for letters."""

    def texts(self, tokens: Tokens) -> list[str]: ...


@runtime_checkable
class Restores(Protocol):
    """A modality whose tokens can be made from their clean features."""

    def restored(self, tokens: Tokens, f_NE: Float[Tensor, "N E"]) -> Tokens: ...


def show_row(reader: Reader, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None = None) -> Image.Image:
    """The picture of one row, by the reader's own `show` or as a strip of its tokens' numbers.

    Raises ValueError where `hidden_N` does not have an entry for each token.
    """
    if hidden_N.shape != tokens.special_N.shape:
        raise ValueError(
            f"show_row: hidden_N must say of each of the row's {len(tokens)} tokens whether it is hidden, got shape "
            f"{list(hidden_N.shape)}"
        )
    if isinstance(reader, Shows):
        return reader.show(tokens, hidden_N, sample).convert("RGB")
    return cells([str(i) for i in range(len(tokens))], hidden_N, special=tokens.special_N >= 0)[0]


def cells(
    texts: Sequence[str], hidden_N: Bool[Tensor, "N"], *, special: Bool[Tensor, "N"] | None = None,
    colours: Sequence[str | None] | None = None, gap_px: int = 3, above_px: int = 0,
    under: Callable[[ImageDraw.ImageDraw, Sequence[Box]], None] | None = None,
) -> tuple[Image.Image, list[Box]]:  # fmt: skip
    """Texts in lines, one cell each, and where each cell stands; hidden ones light on red, special ones grey.

    `colours` are the cells' grounds. `above_px` leaves room over each line; what `under` draws (edges) shows
    there and between the cells, and never over their texts.
    """
    face = font(SIZE_PX)
    hidden, special_ = hidden_N.tolist(), [False] * len(texts) if special is None else special.tolist()
    said = [_shown(text) for text in texts]
    high = SIZE_PX + 9
    boxes, x, y = [], gap_px, gap_px + above_px
    for text in said:
        wide = round(face.getlength(text)) + 8
        if x + wide > WIDTH_PX and x > gap_px:
            x, y = gap_px, y + high + gap_px + above_px
        boxes.append((x, y, x + wide, y + high))
        x += wide + gap_px
    picture = Image.new("RGB", (max([WIDTH_PX, *(box[2] + gap_px for box in boxes)]), y + high + gap_px), PAPER)
    pen = ImageDraw.Draw(picture)
    if under is not None:
        under(pen, boxes)
    for i, (text, box) in enumerate(zip(said, boxes, strict=True)):
        ground = HIDDEN if hidden[i] else (colours[i] if colours else None) or "#f1f1ee"
        pen.rectangle(box, fill=ground)
        ink = PAPER if hidden[i] else SPECIAL if special_[i] else INK
        pen.text((box[0] + 4, box[1] + 3), text, fill=ink, font=face)
    return picture, boxes


def enlarged(picture: Image.Image, *, side_px: int = 320) -> Image.Image:
    """Small pictures some whole number of times as large, to be looked at: the longer side at most `side_px`."""
    times = max(1, side_px // max(picture.size))
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST).convert("RGB")


def stacked(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures under each other, each below its title."""
    face, line = font(SIZE_PX), SIZE_PX + 12
    wide = max(max(picture.width, round(face.getlength(printable(title))) + 8) for title, picture in pictures)
    sheet = Image.new("RGB", (wide, sum(picture.height + line for _, picture in pictures)), PAPER)
    pen, y = ImageDraw.Draw(sheet), 0
    for title, picture in pictures:
        pen.text((4, y + 5), printable(title), fill=INK, font=face)
        sheet.paste(picture, (0, y + line))
        y += picture.height + line
    return sheet


@cache
def font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, which knows most alphabets, where the system has it; otherwise the one that comes with Pillow."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size_px)
    except OSError:
        return ImageFont.load_default(size_px)


def _shown(text: str) -> str:
    text = printable(text.strip(" ").replace("\n", "⏎").replace("\t", "⇥"))
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
