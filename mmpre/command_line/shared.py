"""What commands share: their type, the paths that they are given, and what they print for programs."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

Command = Callable[[list[str]], int | None]
Paths = tyro.conf.Positional[tuple[str, ...]]


def as_json(told: Any) -> str:
    """JSON of what a command tells: dataclasses as the mappings that they are, paths as text."""
    return json.dumps(
        told, indent=2, default=lambda one: str(one) if isinstance(one, Path) else dataclasses.asdict(one)
    )
