"""One writer for a run: a lock on its folder that dies with its owner."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

_WAIT_SECONDS = 1.5  # for an owner that is just ending


class LockedError(RuntimeError):
    """Another process is working on the run."""


class RunLock:
    """Holds `<folder>/lock` by flock, with host, pid and start time in it.

    The system gives the lock back when its owner ends, however it ends. Forked loading workers let go of it at once,
    so that it does not outlive the trainer.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self.file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        file = self.path.open("a+")
        deadline = time.monotonic() + _WAIT_SECONDS
        while not _locked(file):
            if time.monotonic() > deadline:
                file.seek(0)
                owner = file.read().strip()
                file.close()
                raise LockedError(f"{self.path.parent} is being worked on: {_told(owner)}; stop that one first")
            time.sleep(0.05)
        file.seek(0)
        file.truncate()
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": started}) + "\n")
        file.flush()
        self.file = file
        # flock belongs to the open file, which a fork shares: a child that closes its copy keeps the parent's lock
        os.register_at_fork(after_in_child=self._let_go)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _let_go(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _told(owner: str) -> str:
    try:
        who = json.loads(owner)
        return f"host {who['host']}, process {who['pid']}, since {who['started']}"
    except (ValueError, KeyError, TypeError):
        return "by an unknown process"
