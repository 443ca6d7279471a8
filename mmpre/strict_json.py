"""JSON from outside, read strictly: bounded in size and depth, no key twice, no NaN, no half characters; one error."""

import json
import math
import re
from pathlib import Path
from typing import Any

MAX_BYTES = 64 << 20
MAX_DEPTH = 100
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JSONError(ValueError):
    """Text that is not acceptable JSON."""


def read(path: Path | str, *, max_bytes: int = MAX_BYTES) -> Any:
    """Parse a file. Raises JSONError that names it."""
    try:
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
        return parse(data, max_bytes=max_bytes)
    except OSError as e:
        raise JSONError(f"{path}: cannot be read ({e.strerror or e})") from None
    except JSONError as e:
        raise JSONError(f"{path}: {e}") from None


def parse(data: bytes | str, *, max_bytes: int = MAX_BYTES) -> Any:
    """Parse a text of at most `max_bytes`, nested at most 100 deep."""
    if len(data) > max_bytes:
        raise JSONError(f"is longer than {max_bytes:,} bytes")
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
    except UnicodeDecodeError as e:
        raise JSONError(f"is not UTF-8 (byte {e.start})") from None
    _check_depth(text)
    try:
        made = json.loads(
            text, object_pairs_hook=_pairs, parse_constant=_constant, parse_int=_integer, parse_float=_float
        )
        if _SURROGATE.search(text):  # one of a pair alone is no character, and cannot be written as UTF-8
            json.dumps(made, ensure_ascii=False).encode()
        return made
    except json.JSONDecodeError as e:
        raise JSONError(f"line {e.lineno}, column {e.colno}: {e.msg}") from None
    except UnicodeEncodeError:
        raise JSONError("holds half of a surrogate pair, which is no character") from None


def _check_depth(text: str) -> None:
    """Count brackets outside of strings, before the parser recurses into them."""
    depth, quoted, escaped = 0, False, False
    if text.count("[") + text.count("{") <= MAX_DEPTH:
        return
    for c in text:
        if quoted:
            quoted, escaped = escaped or c != '"', c == "\\" and not escaped
        elif c == '"':
            quoted = True
        elif c in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise JSONError(f"is nested more than {MAX_DEPTH} deep")
        elif c in "]}":
            depth -= 1


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in pairs:
        if key in made:
            raise JSONError(f"key {key!r} stands twice in one object")
        made[key] = value
    return made


def _constant(name: str) -> Any:
    raise JSONError(f"{name} is no JSON number")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JSONError(f"{digits[:40]} is too large for a number")
    return value


def _integer(digits: str) -> int:
    if len(digits) > 25:
        raise JSONError(f"a whole number of {len(digits)} digits is not accepted")
    return int(digits)
