"""Telephone prompts read aloud in five languages, with their texts: one speaker a language, 8 kHz.

Debian packages `asterisk-core-sounds-LANG-wav` (sound) and `asterisk-core-sounds-LANG` (texts): en, fr, es, it, ru.
Most prompts exist in all five languages, so the split is by prompt: what one language says in training, no other says
in the test. Telling the languages apart is a test of microphones here; do not report it from this set alone.
"""

import gzip
import io
import json
import wave
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.packages import Apt, unpacked
from mmpre.data_tools.split import RULE, split_of
from mmpre.data_tools.writing import Sample, write_splits

description = "telephone prompts spoken in English, French, Spanish, Italian and Russian, with texts: 2,671, 2.05 hours"
licence = "CC-BY-SA-3.0 (en, fr, es) and CC-BY-3.0 (it, ru), Asterisk core sounds"
size = "97.7 MB"
LANGUAGES = ("en", "fr", "es", "it", "ru")
_SOUNDS, _TEXTS = "usr/share/asterisk/sounds", "usr/share/doc/asterisk-core-sounds"
packages = tuple(
    one
    for lang in LANGUAGES
    for one in (
        Apt(f"asterisk-core-sounds-{lang}-wav", (_SOUNDS,), own=f"{_SOUNDS}/{lang}_*"),
        Apt(f"asterisk-core-sounds-{lang}", (f"{_TEXTS}-{lang}/core-sounds-{lang}.txt.gz",)),
    )
)
tasks = (
    EvalTask(kind="transcription", about="what is said, error rate by character, in each language", input="wav",
             target="txt"),
    EvalTask(kind="retrieval", about="the same prompt in another language", input="wav", target="wav",
             group="json:prompt", baseline="chance: 1 in 60"),
    EvalTask(kind="retrieval", about="the text of an utterance", input="wav", target="txt"),
)  # fmt: skip


def build(out: Path, *, source: Path | None = None, fetch: bool = False) -> Path:
    """Write utterances, `SPLIT/LANG-*.tar`: `wav` as it comes, `txt`, `json` (language, prompt, speaker, seconds)."""
    with whole_folder(out) as aside, unpacked(*packages, source=source, fetch=fetch) as got:
        utterances, seconds, prompts = [], Counter(), {}
        for lang, sounds, texts in zip(LANGUAGES, got[::2], got[1::2], strict=True):
            (folder,) = sorted((sounds.folder / _SOUNDS).glob(f"{lang}_*"))
            said = read_texts(texts.folder / f"{_TEXTS}-{lang}" / f"core-sounds-{lang}.txt.gz")
            for prompt, length, sample in read_sounds(folder, said, lang):
                utterances.append((f"{split_of(prompt)}/{lang}", sample))
                seconds[lang] += length
                prompts.setdefault(split_of(prompt), set()).add(prompt)
        counts = write_splits(aside, utterances, "asterisk", total=len(utterances))
        minutes = {lang: round(length / 60, 1) for lang, length in seconds.items()}
        write_card(aside, name="asterisk", licence=licence, sources=got, counts=counts, tasks=tasks, minutes=minutes,
                   utterances=dict(Counter(place.split("/")[1] for place, _ in utterances)),
                   prompts={split: len(prompts[split]) for split in counts},
                   split_rule=f"by prompt: {RULE}")  # fmt: skip
    return out


def read_texts(path: Path) -> dict[str, str]:
    """What each prompt says; notes on tones and silence, in brackets, are left out."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8-sig").splitlines()
    pairs = [line.partition(":")[::2] for line in lines if not line.startswith(";")]
    said = {prompt.strip(): text.strip() for prompt, text in pairs}
    return {prompt: text for prompt, text in said.items() if text and text[0] not in "[(<"}


def read_sounds(folder: Path, said: dict[str, str], lang: str) -> Iterator[tuple[str, float, Sample]]:
    """Each utterance with its prompt and length in seconds."""
    for path in sorted(folder.rglob("*.wav")):
        prompt = path.relative_to(folder).with_suffix("").as_posix()
        if prompt not in said or prompt.startswith("silence/"):
            continue
        content = path.read_bytes()
        with wave.open(io.BytesIO(content)) as sound:
            length = sound.getnframes() / sound.getframerate()
        if length:  # one file is empty
            about = {"language": lang, "prompt": prompt, "speaker": folder.name, "seconds": round(length, 3)}
            key = f"{lang}/{prompt}".replace(".", "_")
            yield prompt, length, {"__key__": key, "wav": content, "txt": said[prompt], "json": json.dumps(about)}
