"""Runs mmpre and writes down which units every step was given: `python recording.py FILE train ...`."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from mmpre.training import loop


def record(path: Path) -> None:
    """From here on, the first process appends a line for every training step: {"step": s, "given": {m: units}}."""
    step_counts = loop.step_counts

    def counted(batches: Iterable, processes):
        batches = list(batches)
        mine = {made.slot.m: [int(unit) for unit in made.units] for made in batches if made.slot.kind == "train"}
        everyone = processes.gather(mine)
        if processes.rank == 0 and mine:
            given = {str(m): units for one in everyone for m, units in sorted(one.items())}
            with path.open("a") as file:
                file.write(json.dumps({"step": batches[0].slot.step, "given": dict(sorted(given.items()))}) + "\n")
        return step_counts(batches, processes)

    loop.step_counts = counted


def read(path: Path) -> list[tuple[int, dict[str, list[int]]]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [(line["step"], line["given"]) for line in lines]


if __name__ == "__main__":
    from mmpre.command_line.cli import main

    record(Path(sys.argv[1]))
    os.environ["PYTHONUNBUFFERED"] = "1"
    main(sys.argv[2:])
