"""The command that a run was started by, put together again from its record."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from mmpre.plugins import LoadedRecipe
from mmpre.runs.options import RunOptions


def again(record: Mapping[str, Any], found: LoadedRecipe | None) -> str:
    """The command that starts this run anew: what differs from its scale's numbers and from the usual options."""
    recipe = record["recipe"]
    words = ["mmpre", "train", recipe["file"] or recipe["name"]]
    if record.get("scale"):
        words += ["--scale", record["scale"]]
    usual: dict[str, Any] = {}
    if found is not None and (record.get("scale") is None or record["scale"] in found.scales):
        usual = found.defaults(record.get("scale"))
    for name, value in record["numbers"].items():
        if name not in usual or plain(usual[name]) != plain(value):
            words += flag(name, value)
    options = asdict(RunOptions())
    for name, value in record["options"].items():
        if name not in options or options[name] != value:
            words += flag(name, value)
    return shlex.join(words)


def flag(name: str, value: Any) -> list[str]:
    """The words that give a number or an option a value."""
    said = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{said}" if value else f"--no-{said}"]
    if isinstance(value, list | tuple):
        return [f"--{said}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{said}", *(str(word) for pair in value.items() for word in pair)]
    return [f"--{said}", str(value)]


def plain(value: Any) -> Any:
    """A value as it is when it was written as JSON and read again."""
    return json.loads(json.dumps(value, default=str))
