"""A claim's runs, some at once, each in a process of its own; what was done stays when one fails or all are stopped."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.status import Status

from mmpre.claims.one_run import ClaimRun
from mmpre.runs.record_check import RunError

POLL_SECONDS, PLAIN_SECONDS = 0.1, 20.0  # between looks at the processes; between lines where there is no terminal
SAVE_SECONDS = 120.0  # for a run to end its step and save when all are stopped


def carry_out(runs: Sequence[ClaimRun], at_once: int) -> None:
    """Do what is left of some runs. One that fails is told and the others go on.

    Raises RunError that names all that failed, at the end; KeyboardInterrupt on SIGINT and SIGTERM, and whatever else
    went wrong here, after every run was stopped and saved.
    """
    waiting, failed = [run for run in runs if not run.done], {}
    active: dict[ClaimRun, subprocess.Popen] = {}
    with _Told(runs, at_once) as told, _terminable():
        try:
            while waiting or active:
                for run in [one for one in waiting if _ready(one, runs)][: at_once - len(active)]:
                    waiting.remove(run)
                    active[run] = _start(run)
                for run in [one for one, child in active.items() if child.poll() is not None]:
                    if active.pop(run).returncode or not run.done:
                        failed[run] = _last_line(run.log)
                        told.say(f"{run.title} failed: {failed[run]}")
                for run in [one for one in waiting if any(one.after == bad.folder for bad in failed)]:
                    waiting.remove(run)
                    failed[run] = f"it starts from {run.after}"
                told.show(list(active))
                time.sleep(POLL_SECONDS)
        except BaseException:
            told.say("stopping; what was done is kept, the same command goes on")
            for child in active.values():
                child.terminate()
            deadline = time.monotonic() + SAVE_SECONDS
            with suppress(subprocess.TimeoutExpired):
                for child in active.values():
                    child.wait(max(0.0, deadline - time.monotonic()))
            raise
        finally:
            for child in active.values():
                child.kill()
                child.wait()
    if failed:
        lines = "".join(f"\n  {run.title}: {why} ({run.log})" for run, why in failed.items())
        raise RunError(
            f"claim: {len(failed)} of {len(runs)} runs failed; the others are kept. Mend it and do the same again, "
            f"which goes on:{lines}"
        )


def _ready(run: ClaimRun, runs: Sequence[ClaimRun]) -> bool:
    return run.after is None or any(one.folder == run.after and one.trained for one in runs)


def _start(run: ClaimRun) -> subprocess.Popen:
    """Its process, in a session of its own: a terminal's Ctrl-C is told to it by us, once."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("ab") as log:
        child = subprocess.Popen(  # -P: the folder that we are in does not join the import path
            [sys.executable, "-P", "-m", "mmpre.claims.one_run", str(os.getpid())],
            stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    with suppress(BrokenPipeError):  # it ended at once, and its log says why
        child.stdin.write(run.as_json().encode())
        child.stdin.close()
    return child


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word"


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, as SIGINT does, raises KeyboardInterrupt; in the main thread alone, which takes signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Told:
    """How far all is: a line that changes on a terminal, a line now and then elsewhere."""

    def __init__(self, runs: Sequence[ClaimRun], at_once: int) -> None:
        self.runs, self.at_once = runs, at_once
        self.console = Console(file=sys.stderr)
        self.spoke, self.status = -PLAIN_SECONDS, Status("", console=self.console)
        self.live = self.console.is_terminal

    def __enter__(self) -> "_Told":
        if self.live:
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.status.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def show(self, active: Sequence[ClaimRun]) -> None:
        if not active or time.monotonic() - self.spoke < (1.0 if self.live else PLAIN_SECONDS):
            return
        self.spoke, text = time.monotonic(), told(self.runs, active, self.at_once)
        self.status.update(text) if self.live else self.say(text)


def told(runs: Sequence[ClaimRun], active: Sequence[ClaimRun], at_once: int) -> str:
    """Which runs are being worked on, how far they are, and about how long all will take."""
    parts = []
    for run in active:
        step = run.step
        parts.append(f"{run.title}: " + ("measuring" if run.trained else f"step {step:,} of {run.steps:,}"))
    done = sum(run.done for run in runs)
    left = seconds_left(runs, at_once)
    return "; ".join([f"{done} of {len(runs)} runs done", *parts, *([f"{left} left"] if left else [])])


def seconds_left(runs: Sequence[ClaimRun], at_once: int) -> str:
    """By the FLOPs that are left at the pace so far, and the mean time of a measurement; "" where nothing is known."""
    begun = [(run, run.step) for run in runs if (run.folder / "metrics.jsonl").exists()]
    flops = sum(run.flops * step / run.steps for run, step in begun)
    measured = [answer["seconds"] for run in runs if (answer := run.answer) is not None]
    if not flops:
        return ""
    pace = sum(run.seconds() for run, _ in begun) / flops
    seconds = pace * (sum(run.flops for run in runs) - flops)
    if measured:
        seconds += sum(run.sets is not None and run.answer is None for run in runs) * sum(measured) / len(measured)
    seconds /= at_once
    about = "about" if measured else "at least"
    return f"{about} {seconds / 60:.0f} min" if seconds >= 100 else f"{about} {seconds:.0f} s"
