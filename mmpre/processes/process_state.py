"""What code that we load must leave as it was: random generators, threads, signal handlers, folder, import path.

A plugin that sets them would change other recipes' results or how a run ends; it is told of and undone.
"""

import logging
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import rich.style  # noqa: F401  draws a number when it is first imported; a plugin that did so would be blamed

log = logging.getLogger(__name__)
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGALRM)


@contextmanager
def unchanged(who: str, *, draws: bool = False) -> Iterator[None]:
    """Put the process's global state back after some code; with `draws`, it may use the random generators."""
    states = [(name, get, put, get()) for name, get, put in _states(draws)]
    try:
        yield
    finally:
        changed = [name for name, get, put, was in states if not _same(get(), was) and not put(was)]
        if changed:
            log.warning("%s changed %s of the whole process; put back as before", who, ", ".join(changed))


def _states(draws: bool) -> Iterator[tuple[str, Callable[[], Any], Callable[[Any], None]]]:
    yield "the folder", os.getcwd, os.chdir
    yield "the import path", lambda: list(sys.path), lambda was: sys.path.__setitem__(slice(None), was)
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            yield f"the handler of {number.name}", lambda n=number: signal.getsignal(n), _handler_of(number)
    if not draws:
        yield "Python's random generator", random.getstate, random.setstate
    if "numpy" in sys.modules and not draws:
        import numpy

        yield "numpy's random generator", numpy.random.get_state, numpy.random.set_state
    if "torch" in sys.modules:
        import torch

        yield "torch's number of threads", torch.get_num_threads, torch.set_num_threads
        yield "torch's default type", torch.get_default_dtype, torch.set_default_dtype
        yield "whether torch records gradients", torch.is_grad_enabled, torch._C._set_grad_enabled
        if not draws:
            yield "torch's random generator", torch.get_rng_state, torch.set_rng_state


def _handler_of(number: int) -> Callable[[Any], None]:
    def put(handler: Any) -> None:
        if handler is not None:  # one that was not set from Python cannot be put back
            signal.signal(number, handler)

    return put


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    same = one == other
    return bool(same.all()) if hasattr(same, "all") else bool(same)
