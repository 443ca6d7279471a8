"""Dialogues of the game Fish Fillets: Czech and Dutch speech with texts, and the lines in nine more languages.

Debian packages `fillets-ng-data-cs` and `-nl` (the recordings) and `fillets-ng-data` (the texts), GPL-2. Two
voices, the small fish and the big fish, speak most lines. A level of the game stands in one split whole.
"""

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import soundfile

from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.packages import Apt, unpacked
from mmpre.data_tools.split import RULE, split_of
from mmpre.data_tools.writing import Sample, write_splits

description = "dialogues of a game: Czech and Dutch speech, 3.36 hours, with texts and translations, 2 main voices each"
licence = "GPL-2 (fillets-ng-data)"
size = "142.2 MB"
LANGUAGES = ("cs", "nl")
_GAME = "usr/share/games/fillets-ng"
packages = (
    Apt("fillets-ng-data", (f"{_GAME}/script",)),
    *(Apt(f"fillets-ng-data-{lang}", (f"{_GAME}/sound",), own=f"{_GAME}/sound/**/{lang}") for lang in LANGUAGES),
)
tasks = (
    EvalTask(kind="transcription", about="what is said, error rate by character, in each language; with 10 minutes and "
             "1 hour of labels", input="ogg", target="txt"),
    EvalTask(kind="classification", about="which of the two fish speaks", input="ogg", target="json:speaker",
             labels=("small", "big")),
    EvalTask(kind="retrieval", about="the English text of a line", input="ogg", target="json:english"),
)  # fmt: skip
# dialogId("key", "font_speaker", "English text") dialogStr("text")
STRING = r'"((?:[^"\\]|\\.)*)"'
LINE = re.compile(rf"dialogId\(\s*{STRING}\s*,\s*{STRING}\s*,\s*{STRING}\s*\)(?:\s*dialogStr\(\s*{STRING}\s*\))?")
Lines = dict[tuple[str, str], tuple[str, str, str]]  # speaker, English and the language's text, by level and key


def build(out: Path, *, source: Path | None = None, fetch: bool = False) -> Path:
    """Write lines, `SPLIT/LANG-*.tar`: `ogg` as it comes, `txt`, and `json` with level, speaker and translations.

    Recordings without a text are in `unlabelled`; none of them is of a level of valid or test.
    """
    with whole_folder(out) as aside, unpacked(*packages, source=source, fetch=fetch) as (texts, *sounds):
        script = texts.folder / _GAME / "script"
        found = sorted({path.stem.rpartition("_")[2] for path in script.rglob("*dialogs_??.lua")})
        lines = {lang: read_lines(script, lang) for lang in found}
        spoken = [one for lang, got in zip(LANGUAGES, sounds, strict=True)
                  for one in recordings(got.folder / _GAME / "sound", lang, lines)]  # fmt: skip
        counts = write_splits(aside, ((place, sample) for place, _, sample in spoken), "fillets", total=len(spoken))
        minutes = Counter()
        for place, seconds, _ in spoken:
            minutes[place] += seconds / 60
        write_card(aside, name="fillets", licence=licence, sources=(texts, *sounds), counts=counts, tasks=tasks,
                   minutes={place: round(some, 1) for place, some in sorted(minutes.items())},
                   lines=dict(sorted(Counter(place for place, _, _ in spoken).items())),
                   split_rule=f"by level of the game: {RULE}")  # fmt: skip
    return out


def read_lines(script: Path, lang: str) -> Lines:
    lines: Lines = {}
    for path in sorted(script.rglob(f"*dialogs_{lang}.lua")):
        for key, speaker, english, text in LINE.findall(path.read_text(encoding="utf-8")):
            lines[path.parent.name, key] = speaker.removeprefix("font_"), _plain(english), _plain(text)
    return lines


def recordings(folder: Path, lang: str, lines: dict[str, Lines]) -> Iterator[tuple[str, float, Sample]]:
    """Each recording with its place and its length in seconds; files are LEVEL/.../LANG/KEY.ogg."""
    for path in sorted(folder.rglob(f"{lang}/*.ogg")):
        level, name, content = path.relative_to(folder).parts[0], path.stem, path.read_bytes()
        speaker, english, text = lines[lang].get((level, name), ("", "", ""))
        others = {other: lines[other][level, name][2] for other in sorted(lines) if (level, name) in lines[other]}
        seconds = soundfile.info(io.BytesIO(content)).duration
        about = {"language": lang, "level": level, "speaker": speaker, "english": english, "seconds": round(seconds, 3),
                 "texts": {other: said for other, said in others.items() if said}}  # fmt: skip
        key = f"{lang}/{path.relative_to(folder).parent.parent.as_posix()}/{name}".replace(".", "_")
        members = {"__key__": key, "ogg": content, "json": json.dumps(about, ensure_ascii=False)}
        split = split_of(level)
        if text:
            yield f"{split}/{lang}", seconds, members | {"txt": text}
        elif split == "train":
            yield f"unlabelled/{lang}", seconds, members


def _plain(text: str) -> str:
    return text.replace('\\"', '"').replace("\\\\", "\\").strip()
