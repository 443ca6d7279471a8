"""The card beside a data set's shards: what it is, whose, how it was split, and the digests of its shards."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def write_card(out: Path, *, name: str, licence: str, package: str, counts: Mapping[str, int], split_rule: str,
               **more: Any) -> None:  # fmt: skip
    """Write `card.json` into a data set's folder."""
    try:
        package = f"{package} {version(package)}"
    except PackageNotFoundError:
        pass
    shards = {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.rglob("*.tar"))
    }
    card = {"name": name, "licence": licence, "package": package, "counts": dict(counts), "split": split_rule, **more}
    (out / "card.json").write_text(json.dumps(card | {"sha256": shards}, indent=2, ensure_ascii=False) + "\n")
