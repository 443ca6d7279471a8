"""FASTA members as the letters of their records, and `dna` members that are letters alone; plain or gzip."""

import gzip
import io
import zlib
from collections.abc import Sequence

from mmpre.data.sample import BadMember, Sample

MAX_BYTES = 512 << 20  # of a member when decompressed; the longest human chromosome has 253 million bytes
SUFFIXES = tuple(f"{kind}{packed}" for kind in ("dna", "fa", "fasta", "fna") for packed in ("", ".gz"))


def read_fasta(sample: Sample, suffixes: Sequence[str] = SUFFIXES) -> tuple[list[str], list[bytes]]:
    """The names of a member's records and their letters, as they are written, without white space.

    A member that is letters alone is one record, named as the sample's key.
    """
    suffix, data = sample.bytes(suffixes)
    if data[:2] == b"\x1f\x8b":
        data = _decompressed(suffix, data)
    if len(data) > MAX_BYTES:
        raise BadMember("sequence too long", suffix, f"more than {MAX_BYTES:,} bytes; cut it into several samples")
    if suffix.startswith("dna"):
        data = b">" + sample.key.encode() + b"\n" + data
    if not data.lstrip().startswith(b">"):
        begin = repr(data.lstrip()[:20])[1:]
        raise BadMember("not FASTA", suffix, f'wanted lines of letters below a line that begins with ">", got {begin}')
    names, letters = [], []
    for record in data.lstrip()[1:].split(b"\n>"):
        name, _, lines = record.partition(b"\n")
        names.append(name.decode("latin-1").strip())
        letters.append(lines.translate(None, b" \t\r\n"))
    if not any(letters):
        raise BadMember("empty sequence", suffix, "there is no letter in it")
    return names, letters


def _decompressed(suffix: str, data: bytes) -> bytes:
    """At most one byte more than is allowed, so that a small member cannot become a large one."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as e:
        raise BadMember("broken gzip", suffix, f"cannot be decompressed ({e}); compress it again") from None
