"""Turns of contenders, each in a process of its own, so that peak memory is its own and nothing is warm.

The process is started as `python -m MODULE CONTENDER ARGUMENTS` and prints its Turn as JSON; a module hands its
contenders to `serve` when it is run so.
"""

import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mmpre.benchmark import BenchmarkError, Settings, Turn


def take_turns(
    module: str, contenders: Sequence[str], arguments: Mapping[str, Any], settings: Settings, title: str
) -> dict[str, list[Turn]]:
    """Let the contenders of a module take turns, with the same arguments. Raises BenchmarkError if one fails."""
    turns: dict[str, list[Turn]] = {name: [] for name in contenders}
    threads = {name: str(settings.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    env = os.environ | threads | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    for round_ in range(settings.repeats):
        for name in contenders:
            settings.say(f"{title}: {name}, turn {round_ + 1} of {settings.repeats}")
            command = [sys.executable, "-m", module, name, json.dumps(arguments)]
            done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if done.returncode:
                raise BenchmarkError(f"bench, {title}: contender {name} failed:\n{done.stderr[-2000:].strip()}")
            turns[name].append(Turn(**json.loads(done.stdout.splitlines()[-1])))
    return turns


def serve(contenders: Mapping[str, Callable[..., Turn]]) -> None:
    """Be one turn of one contender, as the command line says."""
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(asdict(contenders[name](**arguments))))


def timed(steps: Iterator[float], *, warmup: int, count: int, more: Mapping[str, float] | None = None) -> Turn:
    """Time `count` steps after some others; each gives the amount of work that was in it."""
    for _ in range(warmup):
        next(steps)
    started = time.perf_counter()
    amount = sum(next(steps) for _ in range(count))
    return Turn(amount, time.perf_counter() - started, peak_bytes(), more or {})


def quantiles(first: int, last: int, ahead: int) -> list[float]:
    """Where, between the shortest batch (0) and the longest (1), each step up to `last + ahead` takes its rows.

    The timed steps, `first` to `last`, are spread evenly and shuffled, so that a short turn sees every length; the
    others repeat them.
    """
    count = last - first
    chosen = [(i + 0.5) / count for i in range(count)]
    random.Random(0).shuffle(chosen)
    return [chosen[(step - first) % count] for step in range(last + ahead)]


def peak_bytes(pid: int | str = "self") -> int:
    """The most memory that a process had resident so far; of another one than this 0 where the system does not say."""
    try:  # what getrusage says may be of the process that started the other one
        with open(f"/proc/{pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        if pid != "self":
            return 0
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
