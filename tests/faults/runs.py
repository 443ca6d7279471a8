"""Runs of `broken.py`, as processes or here, on melodies of which one is damaged."""

import os
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from cases import HERE
from harness import Tree, mmpre

import mmpre as library
from mmpre.runs.options import RunOptions

RECIPE = HERE / "broken.py"
STEPS, SAVE_EVERY = 24, 5
OPTIONS = {"exact": True, "workers": 0, "threads": 1, "save_every": SAVE_EVERY, "log_every": 1}


def start(
    run: Path, shards: dict[str, tuple[str, ...]], *words: object, breaks: str = "", processes: int = 1,
    workers: int = 0, **more: object,
) -> Tree:  # fmt: skip
    """Train as processes of their own, or resume where there is a run already."""
    command: list[object] = ["resume", run, "--workers", workers, *words]
    if not (run / "run.json").exists():
        command = ["train", RECIPE, "--out", run, "--exact", "--save-every", SAVE_EVERY, "--log-every", 1, *command[2:]]
        for name, paths in shards.items():
            command += [f"--{name}", *paths]
    return mmpre(*command, processes=processes, log=run.with_suffix(".log"), env={"BREAK": breaks}, **more)


@contextmanager
def broken(breaks: str):
    """Within it, runs in this process break."""
    with patch.dict(os.environ, {"BREAK": breaks}):
        yield


def train(run: Path, shards: dict[str, tuple[str, ...]], breaks: str = "", **more: object) -> Path:
    """Train in this process; `more` are options of the run or the recipe's numbers."""
    options = OPTIONS | {name: more.pop(name) for name in list(more) if name in RunOptions.__dataclass_fields__}
    with broken(breaks):
        return library.train(RECIPE, out=run, options=RunOptions(**options), **shards, **more)


def resume(run: Path, breaks: str = "", **changes: object) -> Path:
    with broken(breaks):
        return library.resume(run, **changes)
