"""A data set's folder, there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmpre.aside import check_vacant


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Give a folder beside `out` to build in, which becomes `out` when all is done; what a broken build left goes.

    Raises: FileExistsError, before any work, if `out` holds something, or is a link or a mount.
    """
    out = out.absolute()
    check_vacant(out)
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if out.exists():
        out.rmdir()
    os.replace(aside, out)
