"""Tux Paint's stamps one by one: photographed and drawn things, named in 78 languages, spoken in up to 14.

Debian package `tuxpaint-stamps-default` (GPL-2). Many recordings of one caption are copies of each other, so what
decides the split is the English caption. For collages of the stamps see `tuxpaint`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.packages import Apt, unpacked
from mmpre.data_tools.split import RULE, split_of
from mmpre.data_tools.svg import draw_png
from mmpre.data_tools.writing import Sample, write_splits

description = "Tux Paint stamps one by one: 950 pictures named in 78 languages, with 7,295 spoken names, 2.9 hours"
licence = "GPL-2 (Tux Paint stamps)"
size = "160.9 MB"
FOLDER = "usr/share/tuxpaint/stamps"
packages = (Apt("tuxpaint-stamps-default", (FOLDER,)),)
LARGE = ("fr", "ro", "ru", "ca", "bg", "es", "be", "el")  # languages that most names are spoken in
tasks = (
    EvalTask(kind="retrieval", about="a picture by its English name, 81 names", input="png", target="txt",
             group="json:name", baseline="chance: 1 in 81"),
    EvalTask(kind="classification", about="the kind of thing, 16 folders", input="png", target="json:folder"),
    EvalTask(kind="retrieval", about="a picture by its name in another language", input="png", target="json:names",
             group="json:name"),
    *(EvalTask(kind="retrieval", about=f"a picture by its spoken name ({lang})", input="png", target=f"{lang}.ogg",
               group="json:name") for lang in LARGE),
    EvalTask(kind="retrieval", about="a written name by the spoken one", input="ogg", target="txt",
             group="json:english", split="speech-test", train="speech-train", valid="speech-valid"),
    EvalTask(kind="transcription", about="a spoken name, 14 languages", input="ogg|wav", target="txt",
             split="speech-test", train="speech-train", valid="speech-valid"),
    EvalTask(kind="classification", about="the spoken language, learned from other recordings", input="ogg|wav",
             target="json:language", labels=("es", "fr", "ru"), split="speech-test", train="../asterisk/train",
             valid="../asterisk/valid", baseline="LDA on means of mel bins 20 to 36 %, chance 33 %"),
)  # fmt: skip


@dataclass(frozen=True)
class Stamp:
    key: str
    picture: Path
    names: dict[str, str]  # by language; "en" is always there
    spoken: dict[str, Path]
    effect: Path | None

    @property
    def name(self) -> str:
        return self.names["en"].lower()


def build(out: Path, *, source: Path | None = None, fetch: bool = False, side_px: int = 144) -> Path:
    """Write pictures in `train`, `valid`, `test`, and each spoken name by itself in `speech-SPLIT/LANG-*.tar`.

    Pictures: `png` as it comes, or drawn `side_px` long where there is only a drawing; `txt` the English name; `json`
    with all names and the folder; `LANG.ogg` for each spoken name, `effect.ogg` the sound that the thing makes.
    Speech: `ogg` (or `wav`), `txt` in that language, and `json` with language, English name and the picture's key.
    """
    with whole_folder(out) as aside, unpacked(*packages, source=source, fetch=fetch) as got:
        found = stamps(got[0].folder / FOLDER)
        counts = write_splits(aside, (one for stamp in found for one in _samples(stamp, side_px)), "tuxpaint_stamps")
        names = sorted({stamp.name for stamp in found})
        write_card(aside, name="tuxpaint_stamps", licence=licence, sources=got, counts=counts, tasks=tasks,
                   names=dict(Counter(split_of(name) for name in names)), side_px=side_px,
                   languages=dict(Counter(lang for stamp in found for lang in stamp.names).most_common()),
                   spoken=dict(Counter(lang for stamp in found for lang in stamp.spoken).most_common()),
                   split_rule=f"by the English name in lower case: {RULE}")  # fmt: skip
    return out


def stamps(root: Path) -> list[Stamp]:
    """Every picture that has a name, in the order of their paths. Some files differ from their picture's in case."""
    beside: dict[tuple[Path, str], dict[str, Path]] = {}
    for path in sorted(root.rglob("*")):
        if path.is_file():
            stem, told, lang = path.stem.partition("_desc")
            is_spoken = told and path.suffix in (".ogg", ".wav")
            part = f"spoken:{lang.removeprefix('_') or 'en'}" if is_spoken else path.suffix
            beside.setdefault((path.parent, (stem if told else path.stem).lower()), {})[part] = path
    found = []
    for (folder, stem), parts in sorted(beside.items()):
        picture = parts.get(".png") or parts.get(".svg")
        if picture is None or ".txt" not in parts:
            continue  # mirrored pictures have no names, nor have a few sounds a picture
        key = f"{folder.relative_to(root).as_posix()}/{stem}".replace(".", "_")
        spoken = {part.partition(":")[2]: path for part, path in parts.items() if part.startswith("spoken:")}
        spoken = {lang: path for lang, path in spoken.items() if re.fullmatch("[a-z]{2}(_[A-Z]{2})?", lang)}
        found.append(Stamp(key, picture, read_names(parts[".txt"]), spoken, parts.get(".ogg")))
    return found


def read_names(path: Path) -> dict[str, str]:
    """The first line is English, others are like "fr.utf8=Un canard."."""
    first, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    pairs = (line.partition(".utf8=") for line in lines)
    return {"en": first.strip()} | {lang: name.strip() for lang, mark, name in pairs if mark and name.strip()}


def _samples(stamp: Stamp, side_px: int) -> Iterator[tuple[str, Sample]]:
    split, content = split_of(stamp.name), stamp.picture.read_bytes()
    png = content if stamp.picture.suffix == ".png" else draw_png(content.decode("utf-8", errors="replace"), side_px)
    about = {"name": stamp.name, "folder": stamp.key.partition("/")[0], "names": stamp.names}
    effect = {"effect.ogg": stamp.effect.read_bytes()} if stamp.effect else {}
    spoken = {f"{lang.lower()}{path.suffix}": path.read_bytes() for lang, path in sorted(stamp.spoken.items())}
    yield split, {"__key__": stamp.key, "png": png, "txt": stamp.names["en"],
                  "json": json.dumps(about, ensure_ascii=False), **spoken, **effect}  # fmt: skip
    for lang, path in sorted(stamp.spoken.items()):
        if lang in stamp.names:
            told = {"language": lang, "english": stamp.name, "picture": stamp.key}
            yield f"speech-{split}/{lang.lower()}", {
                "__key__": f"{lang.lower()}/{stamp.key}", path.suffix[1:]: path.read_bytes(), "txt": stamp.names[lang],
                "json": json.dumps(told, ensure_ascii=False),
            }  # fmt: skip
