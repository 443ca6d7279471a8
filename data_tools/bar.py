"""How far a build has come: a bar on a terminal, one line where there is none."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import track

Thing = TypeVar("Thing")


def bar(things: Iterable[Thing], what: str, *, total: int | None = None) -> Iterator[Thing]:
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        console.print(what, highlight=False)
    yield from track(things, what, total=total, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Something that takes a while and cannot say how far it is."""
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        console.print(what, highlight=False, soft_wrap=True)
        yield
        return
    with console.status(what):
        yield
