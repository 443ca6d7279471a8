"""The texts that benchmarks read, and tokenizers of just the size they want."""

import json
from pathlib import Path

from mmpre.benchmark import BenchmarkError, Settings
from mmpre.data.tokenizer import train_tokenizer
from mmpre.plugins import find_data_set

DEFAULT = Path("sotu")


def find_texts(settings: Settings) -> list[Path]:
    """The folders of texts that are asked for, by default `sotu`. Raises BenchmarkError where one is not there."""
    folders = list(settings.data) or [DEFAULT]
    for folder in folders:
        if (folder / "train").is_dir():
            continue
        if settings.fetch and folder.name == DEFAULT.name and not folder.exists():
            settings.say(f"building {folder}")
            find_data_set(DEFAULT.name).build(folder, fetch=True)
            continue
        raise BenchmarkError(
            f"bench: wanted real text in {folder}/train, there is none; make it with "
            f"`mmpre data build sotu --fetch --out {folder}`, or name another data set's folder by --data"
        )
    return folders


def tokenizer_of(data: Path, vocab: int, folder: Path) -> Path:
    """Word pieces of a data set, made up to `vocab` with unused ones where its texts do not give so many."""
    path = folder / f"{data.name}-{vocab}.json"
    if path.exists():
        return path
    train_tokenizer([data / "train"], path, vocab=vocab)
    made = json.loads(path.read_text(encoding="utf-8"))
    pieces = made["model"]["vocab"]
    pieces |= {f"[unused{i}]": i for i in range(len(pieces), vocab)}
    path.write_text(json.dumps(made), encoding="utf-8")
    return path
