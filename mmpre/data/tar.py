"""Read a tar's headers once, from front to back, whatever state it is in; nothing is ever extracted.

A header says by a checksum whether it is whole. Where one is damaged, the walk goes on at the next whole one, and says
what it passed. Only what can be told for certain is kept: a member whose header, name or end is in doubt is lost.
"""

import hashlib
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from mmpre.data.tar_header import ABSURD_SIZE, BLOCK, Header, next_places, parse, records, resembles

_ZERO = bytes(BLOCK)
_CHUNK = 4 << 20
_MAX_NAME_BYTES = 1 << 20
_MAX_PADDING = 1 << 20  # zeros after the end mark; writers fill records up
_USUAL_PADDING = 2 * BLOCK + 20 * BLOCK  # the end mark, and zeros up to a whole record
_MAX_PROBLEMS = 1000  # kept in words; all are counted


class Problem(NamedTuple):
    """Something lost or left out. `cause` is a short, countable name; `where` a member's name or a byte's place."""

    cause: str
    where: str
    detail: str


@dataclass(slots=True)
class Member:
    """A regular file of the tar. `lost` says why its content cannot be trusted; a `run` is unbroken from end to end."""

    name: bytes
    offset: int
    size: int
    crc: int
    run: int
    lost: str = ""
    doubt: bool = False


@dataclass
class Walk:
    """What was found: members in the tar's order, and before which of them something is missing (`gaps`)."""

    size: int
    digest: str = ""
    headers: int = 0
    members: list[Member] = field(default_factory=list)
    gaps: set[int] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    causes: Counter[str] = field(default_factory=Counter)

    def note(self, cause: str, where: str | bytes, detail: str) -> None:
        self.causes[cause] += 1
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(Problem(cause, printable(where), detail))

    def lose(self, cause: str, where: str | bytes, detail: str) -> None:
        """Note that something is missing before the next member."""
        self.note(cause, where, detail)
        self.gaps.add(len(self.members))


def printable(name: str | bytes) -> str:
    """A name as text that is safe to print: what is not UTF-8 or not printable is escaped."""
    text = name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("ascii", "backslashreplace").decode() if ord(c) > 127
                   else f"\\x{ord(c):02x}" for c in text)  # fmt: skip


def walk(file: BinaryIO, size: int) -> Walk:
    """Go through a tar of `size` bytes; takes its digest (SHA-256) and a CRC-32 of every member on the way.

    Raises OSError if the file cannot be read or is not of that size.
    """
    return _Walker(file, size).go()


class _Stream:
    """Reads a file once from front to back and digests all of it; holds one chunk and the end of the one before."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.start, self.data = 0, b""

    @property
    def end(self) -> int:
        return self.start + len(self.data)

    def load(self) -> bool:
        more = self.file.read(_CHUNK)
        self.digest.update(more)
        kept = self.data[-2 * BLOCK :]
        self.start, self.data = self.end - len(kept), kept + more
        return bool(more)

    def parts(self, place: int, count: int) -> Iterator[memoryview]:
        """`count` bytes from a place on, in parts; fewer at the end of the file."""
        stop = place + count
        while place < stop:
            if place >= self.end:
                if not self.load():
                    return
                continue
            part = memoryview(self.data)[place - self.start : stop - self.start]
            yield part
            place += len(part)

    def at(self, place: int, count: int) -> bytes:
        if self.start <= place and place + count <= self.end:
            return self.data[place - self.start : place - self.start + count]
        return b"".join(bytes(part) for part in self.parts(place, count))

    def probe(self, place: int, count: int) -> bytes:
        """Look ahead without moving on."""
        here = self.file.tell()
        self.file.seek(place)
        data = self.file.read(count)
        self.file.seek(here)
        return data


class _Walker:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self.stream, self.size = _Stream(file), size
        self.walk = Walk(size)
        self.run = 0
        self.guessed: int | None = None  # members before the last place that was found by search
        self.whole: int | None = None  # where the last member's padding ends
        self.tail = True  # whether the last member ends in another byte than zero
        self.long: bytes | None = None  # the name that a GNU or pax header gave for the next member
        self.pax: dict[str, bytes] = {}
        self.doubt = False  # whether a header that may have named the next member was lost
        self.named = False  # whether such headers occur at all
        self.agree: list[tuple[Member, bool]] = []

    def go(self) -> Walk:
        place: int | None = 0
        while place is not None:
            block = self.stream.at(place, BLOCK)
            if len(block) < BLOCK:
                self._end(place, block)
                break
            if block == _ZERO:
                place = self._zeros(place)
            elif (header := parse(block)) is None:
                place = self._damaged(place, block)
            else:
                place = self._entry(place, header)
        while self.stream.load():
            pass
        if self.stream.end != self.size:
            raise OSError(f"changed while it was read: {self.size} bytes before, {self.stream.end} after")
        self.walk.digest = self.stream.digest.hexdigest()
        self._drop_doubtful()
        return self.walk

    def _end(self, place: int, block: bytes) -> None:
        if block.strip(b"\0"):
            self.walk.lose("cut", f"byte {place}", "the tar ends inside a header")
        else:
            self.walk.lose(
                "cut", f"byte {min(place, self.size)}", "the tar ends without its end mark; more may be missing"
            )

    def _zeros(self, place: int) -> int | None:
        """Zeros end a tar, but also stand where a disk lost its data."""
        at = place
        for part in self.stream.parts(place, self.size - place):
            rest = bytes(part).lstrip(b"\0")
            if rest:
                at += len(part) - len(rest)
                break
            at += len(part)
        else:
            if self.size - place > _USUAL_PADDING:
                if not self.tail:
                    self._distrust(place)
                detail = f"{self.size - place} zero bytes end the tar; more may have stood there"
                self.walk.lose("zeroed bytes", f"byte {place}", detail)
            return None
        if self.guessed is not None:  # what the search found was an archive inside a lost member, and this is its end
            gone = {id(member) for member in self.walk.members[self.guessed :]}
            del self.walk.members[self.guessed :]
            self.agree = [one for one in self.agree if id(one[0]) not in gone]
            self.walk.gaps = {gap for gap in self.walk.gaps if gap <= self.guessed}
        elif not self.tail:
            self._distrust(place)
        at -= at % BLOCK
        self.walk.lose("zeroed bytes", f"byte {place}", f"{at - place} zero bytes, but the tar goes on after them")
        self.run += 1
        self._forget()
        self.guessed = None
        return self._search(at)

    def _damaged(self, place: int, block: bytes) -> int | None:
        name = printable(block[:100].rstrip(b"\0"))
        self.walk.lose("damaged header", f"byte {place}", f"its checksum does not fit; it reads {name[:120]!r}")
        if not resembles(block):
            self._distrust(place)
        self.named |= block[156:157] in b"xXgLK" or b"PaxHeader" in block[:100] or b"@LongLink" in block[:100]
        self._forget()
        known = [at for at in next_places(place, block) if self._fits(at)]
        if len(known) == 1:
            return known[0]
        return self._guess(min(known, default=place + BLOCK))

    def _fits(self, place: int) -> bool:
        """Whether a tar may go on or end at a place."""
        if place >= self.size:
            return place == self.size
        rest = self.stream.probe(place, BLOCK)
        if rest == _ZERO and self.size - place <= _MAX_PADDING:
            return not self.stream.probe(place, _MAX_PADDING).strip(b"\0")
        return len(rest) == BLOCK and parse(rest) is not None

    def _guess(self, place: int) -> int | None:
        self.run += 1
        self.guessed = len(self.walk.members)
        self.whole = None
        return self._search(place)

    def _search(self, place: int) -> int | None:
        """The next whole header at or after a place."""
        stream = self.stream
        while True:
            last = stream.end - BLOCK  # the last place whose block is here whole
            found = stream.data.find(b"ustar", max(0, place + 257 - stream.start), max(0, last + 262 - stream.start))
            if found >= 0:
                at = stream.start + found - 257
                block = stream.data[at - stream.start : at - stream.start + BLOCK]
                if at % BLOCK == 0 and parse(block) is not None:
                    return at
                place = at + 1
                continue
            place = max(place, last + 1)
            if not stream.load():
                return None

    def _distrust(self, place: int) -> None:
        """The last member's end is in doubt: what follows it is no header, so bytes may be missing or overwritten."""
        if self.walk.members and self.whole == place:
            member = self.walk.members[-1]
            member.lost = "doubtful end"
            self.walk.note("doubtful end", member.name, "what follows it is no header")

    def _forget(self) -> None:
        self.long, self.pax, self.doubt, self.whole = None, {}, True, None

    def _entry(self, place: int, header: Header) -> int | None:
        self.walk.headers += 1
        size = _pax_size(self.pax, header.size) if header.kind not in b"xXgLK" else header.size
        if size is None or not 0 <= size < ABSURD_SIZE:
            self.walk.lose("absurd size", header.name, f"the header at byte {place} asks for {size} bytes")
            self._forget()
            return self._guess(place + BLOCK)
        begin = place + BLOCK
        while header.more:  # the map of an old GNU sparse file
            block = self.stream.at(begin, BLOCK)
            begin += BLOCK
            if len(block) < BLOCK or not block[504]:
                break
        if header.kind in b"123456":
            size = 0
        end = begin + size
        if end > self.size:
            return self._cut(header, begin, size)
        if header.kind in b"xXLKg":
            self._name(header.kind, begin, size)
        else:
            self._file(header, begin, size)
        return end + -size % BLOCK

    def _cut(self, header: Header, begin: int, size: int) -> None:
        name = self.long or header.name
        detail = f"wants {size} bytes from byte {begin} on, the tar ends at byte {self.size}"
        self.walk.note("cut", name, detail)
        if header.kind in b"0\x007" and not self.doubt:
            self.walk.members.append(Member(name, begin, size, 0, self.run, lost="cut"))
        self.walk.gaps.add(len(self.walk.members))

    def _name(self, kind: bytes, begin: int, size: int) -> None:
        """A header that names the next member. It is not covered by a checksum, so it must at least be well formed."""
        self.whole = None
        if kind in b"Kg":
            return
        self.doubt = False
        data = self.stream.at(begin, size) if size <= _MAX_NAME_BYTES else None
        if kind == b"L" and data is not None:
            self.long = data.rstrip(b"\0")
            data = self.long or None
        elif kind in b"xX":
            pax = records(data) if data is not None else None
            self.pax = pax or {}
            self.long = self.pax.get("path", self.long)
            data = pax
        self.named |= self.long is not None
        if data is None:
            self.walk.lose("damaged header", f"byte {begin}", "the name of the next member cannot be read")
            self.named = self.doubt = True

    def _file(self, header: Header, begin: int, size: int) -> None:
        name = header.name if self.long is None else self.long
        if header.kind == b"5" or (header.kind in b"0\0" and name.endswith(b"/")):
            pass
        elif header.kind not in b"0\x007" or any(key.startswith("GNU.sparse") for key in self.pax):
            self.walk.note("not a regular file", name, f"is of tar type {printable(header.kind)!r} and is left out")
        else:
            crc, last = 0, 1
            for part in self.stream.parts(begin, size):
                crc, last = zlib.crc32(part, crc), part[-1]
            member = Member(name, begin, size, crc, self.run, doubt=self.doubt)
            self.walk.members.append(member)
            self.whole, self.tail = begin + size + -size % BLOCK, last != 0
            if self.long is not None:
                self.agree.append((member, _agrees(self.long, header.field)))
            self.long, self.pax, self.doubt = None, {}, False
            return
        self.long, self.pax, self.doubt, self.whole = None, {}, False, None

    def _drop_doubtful(self) -> None:
        """Lose members whose name may be wrong: a wrong name could join them to another sample."""
        for member in self.walk.members:
            # a name that another header should complete is cut at 100 bytes, or has ? for what is not ASCII
            if member.doubt and (self.named or len(member.name) >= 100 or b"?" in member.name):
                member.lost = "doubtful name"
                self.walk.note("doubtful name", member.name, "the header that may have named it is damaged")
        # writers repeat the start of a long name in the member's own header; where most do, the others are damaged
        if 2 * sum(agrees for _, agrees in self.agree) > len(self.agree):
            for member, agrees in self.agree:
                if not agrees:
                    member.lost = "doubtful name"
                    self.walk.note("doubtful name", member.name, "its long name and its own header disagree")


def _pax_size(pax: dict[str, bytes], size: int | None) -> int | None:
    if "size" not in pax:
        return size
    return int(pax["size"]) if pax["size"].isdigit() and len(pax["size"]) < 20 else None


def _agrees(name: bytes, field: bytes) -> bool:
    return name.startswith(field) or name.decode("utf-8", "replace").encode("ascii", "replace").startswith(field)
