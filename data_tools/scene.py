"""One collage: which concepts, where, and a caption of it. A function of the seed, the split and the number."""

import hashlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from mmpre.data_tools.concept import Concept

GAP_PX = 2  # between two boxes
TRIES = 100  # for a place, before all pictures shrink
YES_NO = ("no", "yes")
GROUNDS = ("white", "#f3f0ea", "#e9f2f9", "#eef7ea", "#fdf3e1", "#f8ebf0", "#efeff6", "#e8f4f1")


class Chance:
    """Random numbers hashed from names. Only `random()` is used, the one stream that Python promises to keep."""

    def __init__(self, *names: object) -> None:
        digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
        self._random = random.Random(int.from_bytes(digest)).random

    def below(self, count: int) -> int:
        return int(self._random() * count)

    def between(self, low: float, high: float) -> float:
        return low + self._random() * (high - low)

    def several(self, count: int, of: int) -> list[int]:
        """`count` different numbers below `of`, in random order."""
        numbers = list(range(of))
        for i in range(count):
            j = i + self.below(of - i)
            numbers[i], numbers[j] = numbers[j], numbers[i]
        return numbers[:count]


@dataclass(frozen=True)
class Region:
    """A picture in a collage: `box` is x1, y1, x2, y2 in pixels, ends excluded; `span` its place in the caption."""

    concept: Concept
    label: int
    box: tuple[int, int, int, int]
    span: tuple[int, int] = (0, 0)

    @property
    def centre(self) -> tuple[float, float]:
        x1, y1, x2, y2 = self.box
        return (x1 + x2) / 2, (y1 + y2) / 2

    def truth(self) -> dict[str, object]:
        about: dict[str, object] = {**self.concept.about(), "class": self.label}
        return about | {"box": self.box, "span": self.span}


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    caption: str
    regions: Sequence[Region]

    def jpeg(self) -> bytes:
        file = io.BytesIO()
        self.image.save(file, "JPEG", quality=90)
        return file.getvalue()

    def truth(self) -> dict[str, object]:
        return {"width": self.image.width, "height": self.image.height, "regions": [r.truth() for r in self.regions]}


def make_scene(
    concepts: Sequence[Concept], labels: Sequence[int], side_px: int, chance: Chance, *, relations: float = 0.0
) -> Scene:
    """Place the concepts' pictures on a light ground, at random places and sizes, none over another; and say so."""
    image = Image.new("RGB", (side_px, side_px), GROUNDS[chance.below(len(GROUNDS))])
    regions = []
    for concept, label, box in zip(concepts, labels, _boxes(concepts, side_px, chance), strict=True):
        x1, y1, x2, y2 = box
        picture = concept.image.resize((x2 - x1, y2 - y1), Image.Resampling.LANCZOS)
        image.paste(picture, (x1, y1), picture)
        regions.append(Region(concept, label, box))
    caption, spans = describe(regions, side_px, chance, relations=relations)
    spanned = [Region(r.concept, r.label, r.box, span) for r, span in zip(regions, spans, strict=True)]
    return Scene(image, caption, spanned)


def _boxes(concepts: Sequence[Concept], side_px: int, chance: Chance) -> list[tuple[int, int, int, int]]:
    # a picture's share of the ground, were it divided evenly; sides are 0.45 to 0.9 of that
    unit = side_px / len(concepts) ** 0.5
    longest = [unit * chance.between(0.45, 0.9) for _ in concepts]
    while True:
        boxes: list[tuple[int, int, int, int]] = []
        for concept, side in zip(concepts, longest, strict=True):
            scale = side / max(concept.image.size)
            width, height = (max(4, round(length * scale)) for length in concept.image.size)
            for _ in range(TRIES):
                x, y = chance.below(side_px - width + 1), chance.below(side_px - height + 1)
                box = (x, y, x + width, y + height)
                if all(_apart(box, other) for other in boxes):
                    boxes.append(box)
                    break
        if len(boxes) == len(concepts):
            return boxes
        longest = [side * 0.9 for side in longest]


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[2] + GAP_PX <= b[0] or b[2] + GAP_PX <= a[0] or a[3] + GAP_PX <= b[1] or b[3] + GAP_PX <= a[1]


def describe(
    regions: Sequence[Region], side_px: int, chance: Chance, *, relations: float
) -> tuple[str, list[tuple[int, int]]]:
    """A caption that names every region once, and each name's span in it, in the order of the regions.

    A share of `relations` of the captions also says what is where, in one of three forms: from each thing to the next,
    from the first to all others, or where in the picture. The rest are plain lists.
    """
    order = chance.several(len(regions), of=len(regions))
    form = chance.below(3) if chance.between(0, 1) < relations else None
    text, spans = "", [(0, 0)] * len(regions)
    for place, index in enumerate(order):
        region = regions[index]
        joint = " and " if place == len(order) - 1 else ", "
        if place and form == 0:
            joint = f" {relation(regions[order[place - 1]], region)} "
        elif place and form == 1:
            joint = f"{joint if place > 1 else ' '}{relation(regions[order[0]], region)} "
        text += joint if place else ""
        spans[index] = (len(text), len(text) + len(region.concept.name))
        text += region.concept.name
        if form == 2:
            text += f" {whereabouts(region, side_px)}"
    return text, spans


def ask(regions: Sequence[Region], side_px: int, groups: Sequence[str], chance: Chance) -> tuple[str, str]:
    """A question about a collage and its answer: one of YES_NO, or a group.

    Half of them ask what is in a ninth of the picture in which the centre of one thing alone lies, where there is one;
    the others whether there is a thing of some group, which half of the time is one that is shown.
    """
    places = [whereabouts(region, side_px) for region in regions]
    alone = [i for i, place in enumerate(places) if places.count(place) == 1]
    if alone and chance.below(2):
        index = alone[chance.below(len(alone))]
        return f"what is {places[index]}?", regions[index].concept.group
    shown = sorted({region.concept.group for region in regions})
    missing = [group for group in groups if group not in shown]
    yes = bool(chance.below(2)) or not missing
    some = shown if yes else missing
    return f"is there a {some[chance.below(len(some))]}?", YES_NO[yes]


def relation(a: Region, b: Region) -> str:
    """How the centre of a lies to the centre of b, along the axis on which they are further apart."""
    dx, dy = (here - there for here, there in zip(a.centre, b.centre, strict=True))
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def whereabouts(region: Region, side_px: int) -> str:
    """In which ninth of the picture a region's centre lies."""
    column, row = (min(2, int(3 * value / side_px)) for value in region.centre)
    words = [word for word in (("top", "", "bottom")[row], ("left", "", "right")[column]) if word]
    return f"at the {' '.join(words)}" if words else "in the middle"
