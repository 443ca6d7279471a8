"""Runs of mmpre as processes that tests break: watched by their progress, ended with everything they started.

Every process of a `Tree` carries a mark in its environment, by which it is found even after its parent is gone. A
condition that does not come true, or a process that does not end, within its own limit fails the test and ends the
whole tree.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mmpre.runs.metrics import read_metrics

TESTS = Path(__file__).parent.parent
_MARK = "MMPRE_TEST_TREE"


class TooLongError(AssertionError):
    """A process gave no answer within its limit: a hang."""


class Tree:
    """A command and all processes it starts; `output` is what they printed so far."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        self.mark, self.log = uuid.uuid4().hex, log
        environment = (
            os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS), _MARK: self.mark} | dict(env or {})
        )
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [str(word) for word in command], env=environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=prepare,
            )  # fmt: skip

    def __enter__(self) -> "Tree":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def living(self) -> list[int]:
        """The processes that carry the mark, the first one first."""
        found = [pid for pid in _pids() if f"{_MARK}={self.mark}".encode() in _environment(pid) and _runs(pid)]
        return sorted(found, key=lambda pid: (pid != self.process.pid, pid))

    def children(self, of: int | None = None) -> list[int]:
        """The living processes whose parent is `of`, by default the first one: a trainer's loading workers."""
        of = self.process.pid if of is None else of
        return [pid for pid in self.living() if _parent(pid) == of]

    def until(self, condition: Callable[[], object], *, seconds: float = 60) -> bool:
        """Wait for a condition; False where the command ended before it came true."""
        deadline = time.monotonic() + seconds
        while True:
            ended = self.process.poll() is not None
            if condition():
                return True
            if ended:
                return False
            if time.monotonic() > deadline:
                raise TooLongError(f"not within {seconds:g} s\n{self._give_up()}")
            time.sleep(0.005)

    def wait(self, *, seconds: float = 60) -> int:
        """The command's exit code, after it and all it started have ended."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TooLongError(f"did not end within {seconds:g} s\n{self._give_up()}") from None
        deadline = time.monotonic() + 10
        while self.living():
            if time.monotonic() > deadline:
                raise TooLongError(f"left {self.living()} running\n{self._give_up()}")
            time.sleep(0.02)
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send all of its processes a signal at once."""
        for pid in self.living():
            send(pid, number)

    def end(self) -> None:
        """Kill all that is left."""
        while left := self.living():
            for pid in left:
                send(pid, signal.SIGKILL)
            time.sleep(0.01)
        self.process.wait()

    def _give_up(self) -> str:
        self.end()
        return self.output[-4000:]


def mmpre(
    *words: object, log: Path, processes: int = 1, env: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> Tree:  # fmt: skip
    """Start the command line, alone or as several processes under torchrun."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return Tree([*launcher, "-m", "mmpre", *map(str, words)], log, env=env, prepare=prepare)


def step_of(run: Path) -> int:
    """The last step that a run has logged, -1 before the first."""
    path = run / "metrics.jsonl"
    steps = [line["step"] for line in read_metrics(path) if "loss" in line] if path.exists() else []
    return max(steps, default=-1)


def lines(run: Path) -> list[dict]:
    """What a run has logged, without times. Numbers come back bit for bit, so == compares them exactly."""
    return [{k: v for k, v in line.items() if k != "time"} for line in read_metrics(run / "metrics.jsonl")]


def newest(run: Path) -> dict[str, str]:
    """The digests of the files of a run's newest checkpoint: weights, optimizer, and state with the ledger's counts."""
    path = max((run / "checkpoints").glob("step-*"))
    return {
        name: one["blake2b"]
        for name, one in json.loads((path / "MANIFEST.json").read_text())["manifest"]["files"].items()
    }


def same(one: Path, other: Path) -> None:
    """Assert that two runs did the same, bit for bit: every logged number, every hole, all that was saved."""
    assert lines(one) == lines(other)
    assert _text(one / "ledger.jsonl") == _text(other / "ledger.jsonl")
    assert newest(one) == newest(other)


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def _stat(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return ["X", "0"]


def _runs(pid: int) -> bool:
    return _stat(pid)[0] not in ("Z", "X")


def _parent(pid: int) -> int:
    return int(_stat(pid)[1])
