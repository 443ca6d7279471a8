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


class Signs:
    """`<folder>/.alive/rank<k>.json`, written anew every few seconds by each process's watchdog.

    Ages are taken between the files' own times, so clocks of different machines do not matter.
    """

    def __init__(self, folder: Path, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder / ".alive", rank, world

    def give(self, phase: str, step: int) -> None:
        """Say what this process is doing. A disk that refuses costs the sign, not the run."""
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "parent": os.getppid(), "phase": phase, "step": step}
        aside = self.folder / f".rank{self.rank}"
        try:
            self.folder.mkdir(exist_ok=True)
            aside.write_text(json.dumps(mine))
            os.replace(aside, self._path(self.rank))
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
        shutil.rmtree(self.folder, ignore_errors=True)

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
