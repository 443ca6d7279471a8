"""Short clips of OpenMoji pictures that move, with captions that name each thing and its motion.

Every truth is known, as for `collages`: what is shown, where it goes and how fast. A clip played backwards has
another caption, so what tells two clips apart is often motion alone. Pictures by OpenMoji (openmoji.org), CC-BY-SA-4.0.
"""
# all coordinates in pixels; t is the time in a clip, 0 to 1

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from mmpre.data_tools import openmoji
from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.concept import Concept, choose
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.openmoji import licence as licence
from mmpre.data_tools.packages import unpacked
from mmpre.data_tools.scene import GROUNDS, Chance
from mmpre.data_tools.split import RULE, split_of
from mmpre.data_tools.writing import Sample, write_splits

description = "clips of OpenMoji pictures that move, with captions (English) of thing and motion, 2,600 clips"
size = "31 MB"
packages = openmoji.packages
UNSEEN = "test-unseen"
tasks = tuple(
    EvalTask(kind="retrieval", about=f"a clip by its caption, {shown}", input="webp", target="txt", split=split)
    for split, shown in (("test", "things seen in training"), (UNSEEN, "things never seen"))
)
FRAMES, FRAME_MS = 16, 100
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (
    *(f"moves {way} {speed}" for way in WAYS for speed in ("slowly", "quickly")),
    "grows", "shrinks", "turns clockwise", "turns anticlockwise",
)  # fmt: skip
SLOW = 0.4  # of the way that a quick thing goes
TRIES = 2_000


@dataclass(frozen=True)
class Thing:
    """A concept that moves in a cell of the picture: `cell` is x1, y1, x2, y2."""

    concept: Concept
    motion: str
    cell: tuple[float, float, float, float]

    def about(self) -> dict[str, object]:
        return {**self.concept.about(), "motion": self.motion, "cell": self.cell}

    def draw(self, image: Image.Image, t: float) -> None:
        """Paste the thing as it is at a time, at fractions of pixels, so that no two frames are equal."""
        x1, y1, x2, y2 = self.cell
        longest = 0.6 * min(x2 - x1, y2 - y1)
        shrink = longest / max(self.concept.image.size)
        size = [max(1, round(length * shrink)) for length in self.concept.image.size]
        picture = self.concept.image.resize(size, Image.Resampling.LANCZOS)
        scale, angle, centre = 1.0, 0.0, [(x1 + x2) / 2, (y1 + y2) / 2]
        word, _, rest = self.motion.partition(" ")
        if word == "moves":
            way, _, speed = rest.partition(" ")
            share = 1.0 if speed == "quickly" else SLOW
            for axis, length in enumerate((x2 - x1, y2 - y1)):
                centre[axis] += WAYS[way][axis] * share * (length - longest) * (t - 0.5)
        elif word == "turns":
            angle = 2 * math.pi * t * (1 if rest == "clockwise" else -1)
        else:
            scale *= 0.4 + 0.6 * (t if word == "grows" else 1 - t)
        # a point of the frame, taken back into the picture
        cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
        middle = picture.width / 2, picture.height / 2
        matrix = (cos, sin, middle[0] - cos * centre[0] - sin * centre[1],
                  -sin, cos, middle[1] + sin * centre[0] - cos * centre[1])  # fmt: skip
        layer = picture.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
        image.paste(layer, (0, 0), layer)


def build(out: Path, *, source: Path | None = None, fetch: bool = False, concepts: int = 100, unseen: int = 40,
          train: int = 2_000, valid: int = 200, test: int = 200, size_px: int = 96, seed: int = 0) -> Path:  # fmt: skip
    """Write clips of 16 frames, one or two things in each: `webp`, `txt` and `json` (things and motions).

    `concepts` different things move in train, valid and test, `unseen` others in test-unseen alone. No set of things
    with their motions stands in two splits, and in valid and test no caption stands twice.
    """
    counts = {"train": train, "valid": valid, "test": test} | ({UNSEEN: test} if unseen else {})
    with whole_folder(out) as aside, unpacked(*packages, source=source, fetch=fetch) as got:
        stock = (concept.trimmed() for concept in openmoji.drawn(*(one.folder for one in got), side_px=size_px))
        known, others = choose(stock, seen=concepts, unseen=unseen)
        clips = (clip for split, count in counts.items()
                 for clip in _clips(others if split == UNSEEN else known, split, count, size_px, seed))  # fmt: skip
        write_splits(aside, clips, "moving", total=sum(counts.values()))
        write_card(aside, name="moving", licence=licence, sources=got, counts=counts, tasks=tasks, seed=seed,
                   size_px=size_px, frames=FRAMES, frame_ms=FRAME_MS, motions=MOTIONS,
                   concepts={"seen": [one.about() for one in known], "unseen": [one.about() for one in others]},
                   split_rule=f"by the things with their motions, in order of the names: {RULE}")  # fmt: skip
    return out


def _clips(concepts: Sequence[Concept], split: str, count: int, side: int, seed: int) -> Iterator[tuple[str, Sample]]:
    taken: set[str] = set()
    for number in range(count):
        for attempt in range(TRIES):
            chance = Chance("moving", seed, split, number, attempt)
            things = choose_things(concepts, side, chance)
            key = " + ".join(sorted(f"{thing.concept.name} {thing.motion}" for thing in things))
            if split in (UNSEEN, split_of(key)) and (split == "train" or key not in taken):
                break
        else:
            raise ValueError(f"moving: found no further clip for {split} after {number} of {count}; ask for more "
                             "concepts or fewer clips")  # fmt: skip
        taken.add(key)
        caption = " and ".join(f"{thing.concept.name} {thing.motion}" for thing in things)
        about = {"things": [thing.about() for thing in things], "frames": FRAMES, "frame_ms": FRAME_MS}
        yield split, {
            "__key__": f"{split}-{number:06d}", "webp": film(things, side, GROUNDS[chance.below(len(GROUNDS))]),
            "txt": caption, "json": json.dumps(about, ensure_ascii=False),
        }  # fmt: skip


def choose_things(concepts: Sequence[Concept], side: int, chance: Chance) -> list[Thing]:
    """One thing in the whole picture, or two, one above the other, named in random order."""
    count = 1 + chance.below(2)
    cells = [(0.0, side * i / count, float(side), side * (i + 1) / count) for i in range(count)]
    chosen = [concepts[i] for i in chance.several(count, of=len(concepts))]
    things = [Thing(one, MOTIONS[chance.below(len(MOTIONS))], cell) for one, cell in zip(chosen, cells, strict=True)]
    return [things[i] for i in chance.several(count, of=count)]


def film(things: Sequence[Thing], side: int, ground: str) -> bytes:
    """The clip as animated WebP: the same bytes every time, which video encoders with threads do not promise."""
    frames = []
    for number in range(FRAMES):
        frame = Image.new("RGB", (side, side), ground)
        for thing in things:
            thing.draw(frame, number / (FRAMES - 1))
        frames.append(frame)
    file = io.BytesIO()
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0, quality=90,
                   method=2)  # fmt: skip
    return file.getvalue()
