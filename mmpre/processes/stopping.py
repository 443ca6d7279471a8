"""How processes end: signals that wait for the step's end, workers that die with the trainer, a watchdog."""

import atexit
import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from mmpre.processes.signs import Signs

HANG_EXIT = 75
UNDER_AGENT = "TORCHELASTIC_RUN_ID"  # in the environment of processes that torchrun has started
START_SECONDS = 300.0  # without a sign of life until the first one: imports, first batches
GRACE_SECONDS = 1.0  # for the other processes' own notes, before they are ended
_PR_SET_PDEATHSIG = 1


class Stopper:
    """Takes SIGTERM and SIGINT and remembers them; the training loop looks at `stopping` after each step.

    Repeated signals do not interrupt a save; the third SIGINT does. `among` others, a process that fails keeps ignoring
    SIGTERM to its end, which an agent sends as soon as one has died: so it can still say what it knows.
    """

    def __init__(self, *, among: bool = False) -> None:
        self.stopping, self.among = False, among
        self._interrupts = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Stopper":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for number, handler in self._before.items():
            if not (kind is not None and self.among and number == signal.SIGTERM):
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts >= 3:
                raise KeyboardInterrupt


def worker_init() -> None:
    """For a loading worker: leave signals to the trainer, and end when it ends, however it ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the system send this process a signal when its parent ends (Linux; elsewhere nothing)."""
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os.kill(os.getpid(), number)


def end_at_once(work: Callable[[], None]) -> NoReturn:
    """Do some work and end the process with its exit code, without taking the interpreter down around its threads.

    For processes of a group: a thread of the backend may still let go of a tensor when the interpreter ends, asks it
    for the lock that it will never get, and takes the process down with SIGABRT ("terminate called without an active
    exception"), so that a run that had saved everything counts as failed. What Python promises at an exit is done
    before: errors are printed, threads that are no daemons are waited for, functions of `atexit` are called (other
    packages' writers, worker processes), logs and output are written out.
    """
    code = 0
    try:
        work()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = code or 1
    os._exit(code)


class Watchdog:
    """Ends the process when it gives no sign of life for some seconds, after writing down where every thread stands.

    `phase` is the sign of life. The note goes to `<run>/hang-rank<k>.txt` and stderr; it tells what the run's other
    processes were last seen doing (`signs`), and what `also` says of this one (its loading workers). Then the
    processes of the run on this machine are ended, and this one with exit code 75. It does not rely on any timeout of
    the loader's or of a collective's.
    """

    def __init__(self, seconds: float, folder: Path, rank: int, signs: Signs | None = None) -> None:
        self.seconds, self.path, self.rank, self.signs = seconds, folder / f"hang-rank{rank}.txt", rank, signs
        self.also: Callable[[], str] = lambda: ""
        self._last, self._phase, self._ended = time.monotonic(), ("start", 0), threading.Event()
        self._limit = max(seconds, START_SECONDS)
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        if self.seconds > 0:
            self.path.unlink(missing_ok=True)  # of an earlier start
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        if self.signs is not None:
            self.signs.end()

    def phase(self, name: str, step: int) -> None:
        self._last, self._phase, self._limit = time.monotonic(), (name, step), self.seconds
        if self.signs is not None:
            self.signs.give(name, step)

    def _watch(self) -> None:
        period = min(self.seconds / 4, 5.0)
        while True:
            if self.signs is not None:
                self.signs.give(*self._phase)
            if self._ended.wait(period):
                return
            if time.monotonic() - self._last > self._limit:
                self._end(period)

    def _end(self, period: float) -> None:
        name, step = self._phase
        note = f"rank {self.rank} gave no sign of life for {self._limit:g} s in phase: {name}, step {step}\n"
        for told in (self.signs.told(period) if self.signs is not None else "", self.also()):
            note += f"{told}\n" if told else ""
        for file in (sys.stderr, self._open()):
            if file is not None:
                file.write(note)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        kill_children()
        if self.signs is not None:
            time.sleep(GRACE_SECONDS)
            self.signs.kill_others()
        os._exit(HANG_EXIT)

    def _open(self):
        try:
            return self.path.open("w")
        except OSError:
            return None


def kill_children() -> None:
    import multiprocessing

    for child in multiprocessing.active_children():
        child.kill()
