"""Copy the files out of a downloaded package (.deb, .tgz, .whl) into a folder, and write nothing anywhere else.

Nobody vouches for an archive, so names are looked at before anything is written, links are passed over (no data comes
as a link), devices are refused, and no archive may grow past a bound.
"""

import bz2
import gzip
import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import BinaryIO

MAX_BYTES = 2 << 30  # of everything in an archive, unpacked
MAX_FILES = 200_000
SUFFIXES = (".deb", ".tgz", ".whl")
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error)


class ArchiveError(ValueError):
    """An archive that cannot be unpacked, or should not be."""


class Part:
    """The next `size` bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left = file, size

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(self.left if size < 0 else min(size, self.left))
        self.left -= len(data)
        return data


class Bounded:
    """An unpacked stream that may not grow past MAX_BYTES, whatever the archive's headers say."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.left = file, MAX_BYTES

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ArchiveError(f"it unpacks to more than {MAX_BYTES:,} bytes")
        return data


def unpack(archive: Path, folder: Path, *, inside: Sequence[str] = ()) -> None:
    """Unpack regular files into `folder`; with `inside`, only those whose names begin with one of these.

    Raises: ArchiveError naming the archive and what is wrong with it.
    """
    try:
        with archive.open("rb") as file:
            if archive.suffix == ".deb":
                _untar(_data_of_deb(file), folder, inside)
            elif archive.suffix == ".tgz":
                _untar(gzip.open(file), folder, inside)
            elif archive.suffix == ".whl":
                _unzip(file, folder, inside)
            else:
                raise ArchiveError(f"wanted {', '.join(SUFFIXES)}, got {archive.suffix or 'no suffix'}")
    except ArchiveError as e:
        raise ArchiveError(f"{archive}: {e}") from None
    except (*DAMAGED, EOFError, OSError, RuntimeError) as e:  # the last: encrypted, or compressed in an unknown way
        if isinstance(e, OSError) and not isinstance(e, gzip.BadGzipFile) and e.errno is not None:
            raise  # the disk, not the archive
        raise ArchiveError(f"{archive}: is damaged or unsafe ({e}); download it again") from None


def _data_of_deb(file: BinaryIO) -> BinaryIO:
    """The files of a Debian package: member data.tar of an `ar` archive, decompressed."""
    opened = {"": lambda part: part, ".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
    if file.read(8) != b"!<arch>\n":
        raise ArchiveError("is no Debian package; download it again")
    while header := file.read(60):
        name, size = header[:16].decode("latin-1").strip().rstrip("/"), header[48:58].strip()
        if len(header) < 60 or header[58:] != b"`\n" or not size.isdigit():
            break
        if name.startswith("data.tar"):
            compression = name.removeprefix("data.tar")
            if compression not in opened:
                raise ArchiveError(f"holds {name}, which Python cannot decompress; unpack it with `dpkg-deb -x`")
            return opened[compression](Part(file, int(size)))
        file.seek(int(size) + int(size) % 2, 1)
    raise ArchiveError("holds no data.tar; download it again")


def _untar(file: BinaryIO, folder: Path, inside: Sequence[str]) -> None:
    count = 0
    with tarfile.open(fileobj=Bounded(file), mode="r|") as packed:
        for member in packed:
            count = _counted(count)
            name = _name(member.name)
            if member.issym() or member.islnk() or member.isdir():
                continue
            if not member.isreg() or member.sparse is not None:  # a sparse one may claim any size
                raise ArchiveError(f"{member.name!r} is neither a plain file nor a folder")
            if not inside or name.startswith(tuple(inside)):
                packed.extract(member, folder, filter="data")


def _unzip(file: BinaryIO, folder: Path, inside: Sequence[str]) -> None:
    count = left = 0
    with zipfile.ZipFile(file) as packed:
        for member in packed.infolist():
            count, left = _counted(count), left + member.file_size
            if left > MAX_BYTES:
                raise ArchiveError(f"it unpacks to more than {MAX_BYTES:,} bytes")
            name = _name(member.filename)
            if not member.is_dir() and (not inside or name.startswith(tuple(inside))):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with packed.open(member) as source, target.open("wb") as copy:
                    shutil.copyfileobj(source, copy)


def _counted(count: int) -> int:
    if count >= MAX_FILES:
        raise ArchiveError(f"it holds more than {MAX_FILES:,} files")
    return count + 1


def _name(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise ArchiveError(f"{name!r} points outside of the archive; it is not what a registry gives out")
    return str(path)
