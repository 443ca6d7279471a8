"""Animated emoji with their names: short clips of people, animals and weather that move, 256 x 256 at 24 frames/s.

Packages `@lobehub/fluent-emoji-anim-1` and `-4` (npm) hold the clips, `emojibase-data` (npm, MIT) the names. The art is
Microsoft's: build it for yourself, do not pass the shards on. Skin tones are variants of one concept.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageSequence

from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.packages import Got, Npm, unpacked
from mmpre.data_tools.split import RULE, split_of
from mmpre.data_tools.writing import Sample, write_splits

description = "animated emoji with names, tags and groups (English): 1,015 clips of 347 concepts, and 903 stills"
licence = "art: Microsoft; packages: MIT (fluent-emoji-anim, emojibase-data); not to be passed on"
size = "357.6 MB"
_DATA = ("package/package.json", "package/en/data.json", "package/meta/groups.json")
packages = (
    Npm("@lobehub/fluent-emoji-anim-1", "1.0.0"),
    Npm("@lobehub/fluent-emoji-anim-4", "1.0.0"),
    Npm("emojibase-data", "17.0.0", _DATA),
)
tasks = (
    EvalTask(kind="retrieval", about="a clip by its name, 35 concepts", input="webp", target="txt",
             group="json:concept", baseline="chance: 1 in 35"),
    EvalTask(kind="classification", about="the group of a clip", input="webp", target="json:group"),
)  # fmt: skip
TONE = re.compile(r"-1f3f[b-f]")


def build(out: Path, *, source: Path | None = None, fetch: bool = False, side_px: int = 0, most: int = 16) -> Path:
    """Write clips: `webp`, `txt` (the concept's name) and `json`; pictures that do not move in `stills`.

    They are written as they come, 256 pixels and some 72 frames, or, where `side_px` is given, that large and with
    `most` frames at most, evenly spread, on white: such clips decode ten times as fast. No concept stands both in
    `stills` and among the clips.
    """
    if side_px < 0 or most < 1:
        raise ValueError(f"fluent_emoji: side_px must be at least 0 and most at least 1, got {side_px} and {most}")
    with whole_folder(out) as aside, unpacked(*packages, source=source, fetch=fetch) as (*clips, names):
        known = read_names(names.folder)
        counts = write_splits(aside, samples(clips, known, side_px, most), "fluent_emoji")
        write_card(aside, name="fluent_emoji", licence=licence, sources=(*clips, names), counts=counts, tasks=tasks,
                   frames_per_second=24, side_px=side_px, most_frames=most if side_px else None,
                   split_rule=f"by file name without the skin tone; stills apart: {RULE}")  # fmt: skip
    return out


def read_names(folder: Path) -> dict[str, dict[str, Any]]:
    """What emojibase says of each emoji, by its code points with and without the variation selector."""
    groups = json.loads((folder / "meta/groups.json").read_text(encoding="utf-8"))["groups"]
    known: dict[str, dict[str, Any]] = {}
    for one in json.loads((folder / "en/data.json").read_text(encoding="utf-8")):
        for variant in (one, *one.get("skins", ())):
            about = {"label": variant["label"], "concept_label": one["label"], "tags": one.get("tags", []),
                     "group": groups.get(str(one.get("group")), "component")}  # fmt: skip
            code = variant["hexcode"].lower()
            known[code] = about
            known.setdefault(code.replace("-fe0f", ""), about)
    return known


def samples(
    clips: Iterable[Got], known: Mapping[str, Mapping[str, Any]], side_px: int = 0, most: int = 16
) -> Iterator[tuple[str, Sample]]:
    for got in clips:
        for path in sorted((got.folder / "assets").glob("*.webp")):
            content = path.read_bytes()
            with Image.open(io.BytesIO(content)) as picture:
                frames = picture.n_frames
            # files leave out leading zeros and a flag's last code point, and some write _ between code points
            code = "-".join(point.zfill(4) for point in re.split("[-_]", path.stem))
            codes = (code, code.replace("-fe0f", ""), f"{code}-e007f")
            about = next((known[one] for one in codes if one in known), None)
            if about is None:
                raise ValueError(f"fluent_emoji: {path}: emojibase knows no emoji {code}; use releases that fit")
            concept = TONE.sub("", path.stem)
            told = {"concept": concept, "package": got.package, "frames": frames, **about}
            yield split_of(concept) if frames > 1 else "stills", {
                "__key__": f"{got.package.rpartition('-')[2]}/{path.stem}",
                "webp": smaller(content, side_px, most) if side_px else content, "txt": about["concept_label"],
                "json": json.dumps(told, ensure_ascii=False),
            }  # fmt: skip


def smaller(content: bytes, side_px: int, most: int) -> bytes:
    """A clip with fewer and smaller frames, laid on white, of the same length in time."""
    with Image.open(io.BytesIO(content)) as picture:
        count, frames, ms = min(most, picture.n_frames), [], 0
        wanted = [i * picture.n_frames // count for i in range(count)]
        for i, frame in enumerate(ImageSequence.Iterator(picture)):
            ms += frame.info.get("duration", 0)
            if i in wanted:
                frame = frame.convert("RGBA").resize((side_px, side_px), Image.Resampling.BOX)
                frames.append(Image.alpha_composite(Image.new("RGBA", frame.size, "white"), frame).convert("RGB"))
    out = io.BytesIO()
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:], quality=90, duration=max(1, ms // count))
    return out.getvalue()
