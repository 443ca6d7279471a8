"""One 512-byte header of a tar, and the records of a pax header: POSIX ustar, pax and the old GNU form.

Source: POSIX.1-2017, pax, section "Extended Description"; GNU tar manual, "Basic Tar Format".
"""

import re
from typing import NamedTuple

BLOCK = 512
ABSURD_SIZE = 1 << 50
_PAX_KEY = re.compile(
    rb"path|linkpath|size|mtime|atime|ctime|uid|gid|uname|gname|comment|charset|hdrcharset|[A-Za-z]+\.[ -~]+"
)


class Header(NamedTuple):
    name: bytes
    size: int | None  # None where the field holds no number
    kind: bytes
    field: bytes  # the name's own field, without the prefix and cut at 100 bytes
    more: bool  # an old GNU sparse file whose map goes on in the next block


def parse(block: bytes) -> Header | None:
    """A header, or None where the checksum does not fit."""
    if block[257:262] not in (b"ustar", bytes(5)):  # nothing stands there before POSIX
        return None
    try:
        if _number(block[148:156]) not in _sums(block):
            return None
    except ValueError:
        return None
    try:
        size = _number(block[124:136])
    except ValueError:
        size = None
    field = block[:100].split(b"\0", 1)[0]
    name = field
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0", 1)[0] + b"/" + field
    kind = block[156:157]
    return Header(name, size, kind, field, kind == b"S" and block[482] != 0)


def _sums(block: bytes) -> tuple[int, ...]:
    total = sum(block) - sum(block[148:156]) + 8 * 32
    if block.isascii():
        return (total,)
    return total, total - 256 * sum(
        byte > 127 for byte in block[:148] + block[156:]
    )  # some old writers add signed bytes


def _number(field: bytes) -> int:
    if field[0] in (0x80, 0xFF):
        value = int.from_bytes(field[1:], "big")
        return value - (1 << 8 * (len(field) - 1)) if field[0] == 0xFF else value
    digits = field.split(b"\0", 1)[0].strip()
    if not digits:
        return 0
    if not digits.isdigit():
        raise ValueError(f"no octal number: {digits!r}")
    return int(digits, 8)


def resembles(block: bytes) -> bool:
    """Whether a block that fails its checksum was a header all the same."""
    if block[257:262] == b"ustar":
        return True
    try:
        off = abs(_number(block[148:156]) - _sums(block)[0])
    except ValueError:
        return False
    return off in (1, 2, 4, 8, 16, 32, 64, 128)  # one flipped bit


def next_places(place: int, block: bytes) -> set[int]:
    """Where the next header may stand after a damaged one: by its size as it is, or with one bit of it flipped back."""
    fields = [block[124:136]]
    try:
        off = _number(block[148:156]) - _sums(block)[0]
    except ValueError:
        off = 0
    for i in range(124, 136):
        for bit in range(8):
            flipped = block[i] ^ (1 << bit)
            if off and flipped - block[i] == off:
                fields.append(block[124:i] + bytes([flipped]) + block[i + 1 : 136])
    places = set()
    for one in fields:
        try:
            size = _number(one)
        except ValueError:
            continue
        if 0 <= size < ABSURD_SIZE:
            places.add(place + BLOCK + size + -size % BLOCK)
    return places


def records(data: bytes) -> dict[str, bytes] | None:
    """The records of a pax header, or None where it is damaged."""
    found: dict[str, bytes] = {}
    while data:
        digits, space, _ = data.partition(b" ")
        if not space or not digits.isdigit() or not len(digits) + 3 <= int(digits[:9]) <= len(data):
            return None
        record, data = data[len(digits) + 1 : int(digits)], data[int(digits) :]
        key, equals, value = record[:-1].partition(b"=")
        if not equals or record[-1:] != b"\n" or not _PAX_KEY.fullmatch(key):
            return None
        found[key.decode()] = value
    if "hdrcharset" not in found and not _is_utf8(found.get("path", b"")):
        return None
    return found


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
