"""Loading workers: they make ahead what is asked for, in its order, and none of them ends or hangs unseen."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from mmpre.data.parcel import Parcel, unwrap, wrap
from mmpre.processes.stopping import worker_init

Made = TypeVar("Made")
Note = Callable[[int], None]


class LoadingError(RuntimeError):
    """Anything unforeseen in a loading worker, as one plain class that always reaches the trainer."""


class Asked(Protocol):
    """What a worker is asked to make."""

    step: int
    m: int


class Source(Protocol[Made]):
    """Makes what is asked for. Calls `note` with the number of each unit that it begins; `name` describes a unit.

    Picklable. Raises LoadingError and nothing else.
    """

    note: Note

    def __getitem__(self, asked: Asked) -> Made: ...

    def name(self, unit: int) -> str: ...


class Prefetch(Generic[Made]):
    """What `source` makes of `order`, one by one. Close it to end its workers.

    Each worker writes down what it is at, where the trainer and its watchdog can read it after the worker has died or
    while it hangs. With no workers the source is called in the trainer itself.
    """

    def __init__(self, source: Source[Made], order: Iterable[Asked], workers: int, *, pin: bool = False) -> None:
        self.source = source
        self.board = torch.full((max(workers, 1), 3), -1, dtype=torch.int64).share_memory_()
        self._loading = None
        if workers == 0:
            self._made: Iterator[Any] = map(_Worker(source, self.board).__getitem__, order)
            return
        loader = DataLoader(
            _Worker(source, self.board), sampler=_Order(order), batch_size=None, collate_fn=_as_it_is,
            num_workers=workers, prefetch_factor=4, worker_init_fn=_start, pin_memory=pin,
        )  # fmt: skip
        self._made = self._loading = iter(loader)

    def __iter__(self) -> "Prefetch[Made]":
        return self

    def __next__(self) -> Made:
        try:
            made = next(self._made)
        except (RuntimeError, OSError, EOFError):  # what torch says when a worker ends while it hands tensors over
            self.check(wait_s=1.0)
            raise
        if isinstance(made, _Failed):
            raise LoadingError(made.text)
        return unwrap(made) if isinstance(made, Parcel) else made

    def close(self) -> None:
        # at once: what torch does when the interpreter ends waits for workers that ignore SIGTERM
        if self._loading is not None:
            self._loading._shutdown_workers()

    def check(self, wait_s: float = 0.0) -> None:
        """Raise LoadingError where a worker has ended (or does so soon): torch tells the process number alone, and from
        a signal's handler, so its error may come out of any line of the trainer."""
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and all(worker.exitcode is None for worker in self._workers()):
            time.sleep(0.02)
        for number, worker in enumerate(self._workers()):
            if worker.exitcode is not None:
                how = f"ended by itself with exit code {worker.exitcode}"
                if worker.exitcode < 0:
                    how = f"was ended by signal {-worker.exitcode} ({signal.Signals(-worker.exitcode).name})"
                    how += ", as when memory runs out" if worker.exitcode == -signal.SIGKILL else ""
                raise LoadingError(
                    f"loading worker {number} (process {worker.pid}) {how}, while it made {self._at(number)}; look at "
                    "that sample and at the machine's memory, then go on with `mmpre resume`, with fewer workers "
                    "if memory is short"
                )

    def describe(self) -> str:
        """What each worker is at, a line each."""
        return "\n".join(
            f"loading worker {number} (process {worker.pid}, {_state(worker.pid)}) makes {self._at(number)}"
            for number, worker in enumerate(self._workers())
        )

    def _workers(self) -> Sequence[Any]:
        return getattr(self._loading, "_workers", ())

    def _at(self, number: int) -> str:
        step, m, unit = self.board[number].tolist()
        if step < 0:
            return "nothing yet"
        return f"step {step}, micro-batch {m}" + (f", {self.source.name(unit)}" if unit >= 0 else "")


class _Failed:
    def __init__(self, text: str) -> None:
        self.text = text


class _Worker(Dataset):
    """The source in a worker: writes on the board, and hands errors over as values, which cannot get lost."""

    def __init__(self, source: Source, board: torch.Tensor) -> None:
        self.source, self.board = source, board

    def __getitem__(self, asked: Asked) -> Any:
        about = torch.utils.data.get_worker_info()
        place = self.board[about.id if about else 0].numpy()
        place[:] = asked.step, asked.m, -1

        def note(unit: int) -> None:
            place[2] = unit

        self.source.note = note
        try:
            made = self.source[asked]
            return wrap(made) if about else made
        except LoadingError as e:
            return _Failed(str(e))
        except Exception as e:
            return _Failed(
                f"loading worker {about.id}, step {asked.step}: what it made cannot be handed over "
                f"({type(e).__name__}: {e}); if shared memory is short, enlarge /dev/shm or use fewer workers"
            )
        finally:
            del self.source.note


class _Order(Sampler):
    def __init__(self, order: Iterable[Asked]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[Asked]:
        return iter(self.order)


def _as_it_is(made: Any) -> Any:
    return made


def _start(number: int) -> None:
    torch.set_num_threads(1)
    worker_init()


def _state(pid: int) -> str:
    """What the system says of a process (Linux): running, asleep, stopped, waiting for the disk, dead."""
    names = {"R": "running", "S": "asleep", "D": "waiting for the disk", "T": "STOPPED", "Z": "dead", "X": "dead"}
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (OSError, IndexError):
        return "gone" if os.path.isdir("/proc/self") else "state unknown"
    return names.get(letter, letter)
