"""The card beside a data set's shards: what it is, whose, where from, how it was split, what it tests, and digests."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmpre.data_tools.packages import Got
from mmpre.evaluation.task import EvalTask


def write_card(out: Path, *, name: str, licence: str, sources: Sequence[Got], counts: Mapping[str, int],
               split_rule: str, tasks: Sequence[EvalTask] = (), **more: Any) -> None:  # fmt: skip
    """Write `card.json` into a data set's folder."""
    files = sorted(path for path in out.rglob("*") if path.suffix in (".tar", ".tsv"))
    digests = {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    card = {
        "name": name, "licence": licence, "sources": [got.about() for got in sources], "counts": dict(counts),
        "split": split_rule, "tasks": [task.told() for task in tasks], **more, "sha256": digests,
    }  # fmt: skip
    (out / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
