"""From the name of a user's file to a sample's key and a member's suffix, by the naming rule of grouping.py.

WebDataset ends a key at the first dot of the base name. People's names have dots elsewhere, so here a suffix is the
longest that a reader knows, or else what follows the last dot; the other dots are replaced in the key.
"""

import re

from mmpre.data import audio, fasta, video_file
from mmpre.data.code import LANGUAGES
from mmpre.data.sample import IMAGE_FORMATS

# suffixes in whose place a reader takes any other of the same line
ALIKE = {
    "picture": frozenset(IMAGE_FORMATS), "video": frozenset(video_file.FORMATS) - frozenset(IMAGE_FORMATS),
    "sound": frozenset(audio.FORMATS), "sequence": frozenset(fasta.SUFFIXES),
}  # fmt: skip
READ = frozenset().union(*ALIKE.values(), (language.suffix for language in LANGUAGES)) | {
    "txt", "json", "cls", "npy", "npz", "question.txt", "answer.json", "regions.safetensors", "derived.safetensors",
}  # fmt: skip


def cut_name(name: str) -> tuple[str, str]:
    """A file's name without its suffix, and the suffix in lower case ("" where it has none)."""
    parts = name.split(".")
    known = (i for i in range(1, len(parts)) if ".".join(parts[i:]).lower() in READ)
    at = next(known, max(1, len(parts) - 1))
    return ".".join(parts[:at]), ".".join(parts[at:]).lower()


def fault_of(suffix: str) -> str:
    """Why a file with this suffix cannot become a member; "" where it can."""
    if not suffix:
        return "its name has no suffix that says what it is"
    if suffix.startswith("_") or not suffix.isprintable():
        return f"its suffix {suffix!r} would not be read back from a shard; rename it"
    return ""


def safe_key(name: str) -> str:
    """A key that WebDataset reads back as it is: no dots, nothing unprintable, no __ at its beginning."""
    key = "".join(c if c.isprintable() and c not in ". \\" else "_" for c in name).strip("/")
    return re.sub("^__+", "_", key) or "_"


def kind_of(suffix: str) -> str:
    """What readers take a member for: suffixes of one kind stand for each other, any other one is its own kind."""
    return next((kind for kind, suffixes in ALIKE.items() if suffix in suffixes), suffix)
