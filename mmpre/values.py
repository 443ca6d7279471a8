"""Whether a value is what a signature asks for: what comes from a record or from a caller has no types of its own."""

import inspect
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MOST = 1 << 53  # whole numbers past this are not exact in every reader of JSON
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "nothing (None)"}


def problems(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> list[str]:
    """What is wrong with some values, one sentence each; kinds that are no plain types are not looked into."""
    found = []
    for name, value in values.items():
        kind = kinds.get(name, inspect.Parameter.empty)
        if (wrong := _range(value)) is not None:
            found.append(f"{name} must be {wrong}, got {_told(value)}")
        elif not _fits(value, kind):
            hint = ""
            if isinstance(value, str) and _fits(_number(value), kind):
                hint = "; write it as a number, not as a text"
            if isinstance(value, str) and typing.get_origin(kind) in (tuple, list):
                hint = f"; for a single one give ({value[:60]!r},)"
            found.append(f"{name} must be {_words(kind)}, got {_told(value)}{hint}")
    return found


def _range(value: Any) -> str | None:
    if isinstance(value, list | tuple):
        return next((wrong for one in value if (wrong := _range(one)) is not None), None)
    if isinstance(value, float) and not math.isfinite(value):
        return "finite"
    if isinstance(value, int) and not -MOST < value < MOST:
        return "between -2^53 and 2^53"
    return None


def _fits(value: Any, kind: Any) -> bool:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _fits(value, parts[0])
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if kind is None or kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is str or kind is Path:
        return isinstance(value, str | Path)
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            return False
        if origin is list or parts[1:] == (...,):
            return all(_fits(one, parts[0]) for one in value)
        return len(parts) == len(value) and all(_fits(one, part) for one, part in zip(value, parts, strict=True))
    if origin is typing.Literal:
        return value in parts
    return True


def _words(kind: Any) -> str:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _words(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(part) for part in parts))
    if origin in (tuple, list):
        return f"a list, each {_words(parts[0])}"
    if origin is typing.Literal:
        return f"one of {', '.join(map(repr, parts))}"
    return _WORDS.get(kind, _WORDS[str] if kind is Path else str(kind))


def _number(text: str) -> Any:
    try:
        return int(text) if text.lstrip("-").isdigit() and len(text) < 30 else float(text)
    except ValueError:
        return text


def _told(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of over 4300 digits
        text = "a number of thousands of digits"
    kind = {str: "the text ", dict: "an object ", list: "the list "}.get(type(value), "")
    return f"{kind}{text[:80]}{' ...' if len(text) > 80 else ''}"
