"""Signs of life between the processes of a run: what each is doing, in a small file that the others can read.

A process that was stopped cannot tell that it is stuck; the others can tell by the age of its file.
"""

import json
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

_BYTES = 512


class Signs:
    """`<folder>/.alive/rank<k>.json`, overwritten at every change of phase and every few seconds by each process's
    watchdog.

    Ages are taken between the files' own times, so clocks of different machines do not matter.
    """

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder / ".alive", rank, world
        self._file: int | None = None
        self._who = {"host": socket.gethostname(), "pid": os.getpid(), "parent": os.getppid()}

    def give(self, phase: str, step: int) -> None:
        """Say what this process is doing. A disk that refuses costs the sign, not the run."""
        mine = json.dumps({**self._who, "phase": phase, "step": step})
        try:
            if self._file is None:
                self.folder.mkdir(exist_ok=True)
                self._file = os.open(self._path(self.rank), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.pwrite(self._file, mine.ljust(_BYTES).encode(), 0)  # always as long, so none is left of the one before
        except OSError:
            pass

    def told(self, period: float) -> str:
        """What the other processes were doing when last heard of; one that should have spoken since is pointed out."""
        lines = []
        try:
            os.utime(self._path(self.rank))
        except OSError:
            pass
        for rank in range(self.world):
            if rank == self.rank:
                continue
            sign, age = self._read(rank)
            if sign is None:
                lines.append(f"rank {rank} was never heard of")
                continue
            silent = f"; SILENT for {age:.0f} s: stopped, or its machine is gone" if age > 2 * period + 1 else ""
            where = f"process {sign['pid']} on {sign['host']}"
            lines.append(f"rank {rank} ({where}) was in phase: {sign['phase']}, step {sign['step']}{silent}")
        return "\n".join(lines)

    def kill_others(self) -> None:
        """End the run's other processes on this machine: those that the same agent has started."""
        for rank in range(self.world):
            sign, _ = self._read(rank)
            ours = sign is not None and (sign["host"], sign["parent"]) == (socket.gethostname(), os.getppid())
            if rank != self.rank and ours and _parent(sign["pid"]) == os.getppid():
                os.kill(sign["pid"], signal.SIGKILL)

    def sweep(self) -> None:
        """Remove what an earlier start has left."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def end(self) -> None:
        """Take this process's sign away."""
        try:
            if self._file is not None:
                os.close(self._file)
                self._file = None
            self._path(self.rank).unlink(missing_ok=True)
            self.folder.rmdir()
        except OSError:  # others are still at work
            pass

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank{rank}.json"

    def _read(self, rank: int) -> tuple[dict[str, Any] | None, float]:
        """A process's last sign, and by how many seconds it is older than this one's."""
        try:
            sign = json.loads(self._path(rank).read_text())
            return sign, self._path(self.rank).stat().st_mtime - self._path(rank).stat().st_mtime
        except (OSError, ValueError):
            return None, 0.0


def _parent(pid: int) -> int | None:
    """The parent of a living process, so that a number that was given to another one since is left alone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, ValueError, IndexError):
        return None
