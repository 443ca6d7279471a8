"""Files and folders that get their name when they are whole, or never; lines that are appended whole, or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def folder_aside(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to write into; it is synced and renamed at the end, or removed on an error.

    Raises FileExistsError where `check_vacant` does. What a killed writer left is removed first.
    """
    out = out.absolute()
    check_vacant(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{out.name}.aside-*"):
        shutil.rmtree(left, ignore_errors=True)
    aside = out.parent / f".{out.name}.aside-{secrets.token_hex(4)}"
    aside.mkdir()
    try:
        yield aside
        for path in aside.rglob("*"):
            sync(path)
        os.rename(aside, out)
        sync(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def check_vacant(out: Path) -> None:
    """Raise FileExistsError where a folder that is made aside could not become `out`; an empty one there gives way."""
    if out.is_symlink():
        raise FileExistsError(f"{out} is a link, which no folder can replace; name the place that it leads to")
    if os.path.ismount(out):
        raise FileExistsError(f"{out} is a mount, which no folder can replace; name a new folder in it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already and not empty; name a new folder, or remove it to begin again")


@contextmanager
def file_aside(out: Path) -> Iterator[Path]:
    """A hidden file beside `out` to write; it is synced and takes `out`'s place at the end, or is removed."""
    aside = out.parent / f".{out.name}.aside-{secrets.token_hex(4)}"
    try:
        yield aside
        sync(aside)
        os.replace(aside, out)
        sync(out.parent)
    finally:
        aside.unlink(missing_ok=True)


def append(path: Path, lines: str) -> None:
    """Append lines whole, or raise OSError and leave the file as it was."""
    with path.open("ab", buffering=0) as file:
        size, data = file.seek(0, os.SEEK_END), lines.encode()
        try:
            while data:
                data = data[file.write(data) :]
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def sync(path: Path) -> None:
    """Have the disk hold what was written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
