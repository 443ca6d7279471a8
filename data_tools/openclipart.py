"""Open Clip Art: drawings in the public domain with titles and keywords.

Debian package `openclipart-svg`. Left out: folders of icons and plain shapes, copies, drawings of more than 200 kB, and
what has no title or no keywords.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.packages import Apt, unpacked
from mmpre.data_tools.split import RULE, split_of
from mmpre.data_tools.svg import draw_png
from mmpre.data_tools.writing import Sample, write_splits

description = "Open Clip Art drawings with titles and keywords (English): 3,620 pictures in 20 folders"
licence = "public domain (Open Clip Art Library)"
size = "24.9 MB"
FOLDER = "usr/share/openclipart/svg"
packages = (Apt("openclipart-svg", (FOLDER,)),)
tasks = (
    EvalTask(kind="retrieval", about="a picture by its title, 232 titles", input="png", target="txt",
             group="json:title", baseline="chance: 1 in 232"),
    EvalTask(kind="classification", about="the folder, 20 ways", input="png", target="json:folder"),
)  # fmt: skip
LEFT_OUT = ("computer", "shapes")
MAX_BYTES = 200_000
DC, RDF = "{http://purl.org/dc/elements/1.1/}", "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


@dataclass(frozen=True)
class Drawing:
    key: str
    title: str
    keywords: tuple[str, ...]
    svg: bytes

    def sample(self, side_px: int) -> Sample | None:
        """None for the few drawings that resvg cannot draw, or draws nothing of."""
        try:
            png = draw_png(self.svg.decode("utf-8"), side_px)
        except ValueError:
            return None
        about = {"title": self.title.lower(), "keywords": self.keywords, "folder": self.key.partition("/")[0]}
        return {"__key__": self.key, "png": png, "txt": self.title, "json": json.dumps(about, ensure_ascii=False)}


def build(out: Path, *, source: Path | None = None, fetch: bool = False, side_px: int = 144) -> Path:
    """Write drawings, the longer side `side_px`: `png`, `txt` (the title) and `json` (title, keywords, folder)."""
    with whole_folder(out) as aside, unpacked(*packages, source=source, fetch=fetch) as got:
        chosen = list(drawings(got[0].folder / FOLDER))
        drawn = ((split_of(one.title.lower()), one.sample(side_px)) for one in chosen)
        kept = ((split, sample) for split, sample in drawn if sample is not None)
        counts = write_splits(aside, kept, "openclipart", total=len(chosen))
        titles = Counter(split_of(title) for title in sorted({one.title.lower() for one in chosen}))
        write_card(aside, name="openclipart", licence=licence, sources=got, counts=counts, tasks=tasks,
                   titles=dict(titles), not_drawn=len(chosen) - sum(counts.values()), side_px=side_px,
                   split_rule=f"by the title in lower case: {RULE}")  # fmt: skip
    return out


def drawings(root: Path) -> Iterator[Drawing]:
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.svg")):
        svg, folder = path.read_bytes(), path.relative_to(root).parts[0]
        digest = hashlib.sha1(svg).digest()
        if digest in seen:
            continue
        seen.add(digest)
        title, keywords = read_about(svg)
        if title and keywords and folder not in LEFT_OUT and len(svg) <= MAX_BYTES:
            key = path.relative_to(root).with_suffix("").as_posix().replace(".", "_")
            yield Drawing(key, title, keywords, svg)


def read_about(svg: bytes) -> tuple[str, tuple[str, ...]]:
    """The title and keywords in a drawing's own description; empty where there are none."""
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError:
        return "", ()
    titles = (one.text.strip() for one in root.iter(f"{DC}title") if one.text and one.text.strip())
    words = (item.text for subject in root.iter(f"{DC}subject") for item in subject.iter(f"{RDF}li"))
    return next(titles, ""), tuple(word.strip() for word in words if word and word.strip())
