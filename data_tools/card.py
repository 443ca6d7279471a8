"""The card beside a data set's shards: what it is, whose, where from, how it was split, what it tests, and digests."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mmpre.data_tools.packages import Got


@dataclass(frozen=True, kw_only=True)
class EvalTask:
    """What a model can be evaluated by on held-out samples of a set.

    `input` and `target` name members of a sample, such as "txt" or, where sets differ, "ogg|wav", or fields of its
    JSON, such as "json:year". Samples whose `group` is equal are right answers of each other. A probe is fitted on
    `train` and chosen on `valid`; splits may be those of another set that stands beside this one ("../other/train").
    `labels` limits a task to samples with these targets. `other` is the second side of a pair: of similarity, or the
    wrong one of a minimal pair, where `target` is not read. `prompts` are texts that name a class at {}, `epochs` how
    often a network that is trained on the labels sees them. `baseline` is what is known of simple methods and of
    chance, in plain words.
    """

    kind: Literal[
        "classification", "few-shot", "zero-shot", "fine-tuning", "sequence labelling", "retrieval", "regression",
        "similarity", "minimal pairs", "transcription", "detection", "link prediction",
    ]  # fmt: skip
    about: str
    input: str
    target: str
    group: str | None = None
    split: str = "test"
    train: str = "train"
    valid: str = "valid"
    labels: tuple[str, ...] | None = None
    other: str | None = None
    prompts: tuple[str, ...] | None = None
    epochs: int | None = None
    baseline: str | None = None

    def fields(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def write_card(out: Path, *, name: str, licence: str, sources: Sequence[Got], counts: Mapping[str, int],
               split_rule: str, tasks: Sequence[EvalTask] = (), **more: Any) -> None:  # fmt: skip
    """Write `card.json` into a data set's folder."""
    files = sorted(path for path in out.rglob("*") if path.suffix in (".tar", ".tsv"))
    digests = {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    card = {
        "name": name, "licence": licence, "sources": [got.about() for got in sources], "counts": dict(counts),
        "split": split_rule, "tasks": [task.fields() for task in tasks], **more, "sha256": digests,
    }  # fmt: skip
    (out / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
