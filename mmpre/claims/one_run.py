"""One run of a claim in a process of its own: trained to its end, or on from where it was, and measured.

`python -m mmpre.claims.one_run PARENT` (the number of the process that starts it) reads what to do from its input, as
JSON; runs.py starts it. A signal stops it at the end of a step, with all that was done saved.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mmpre.data.remote import public
from mmpre.evaluation.evaluate import evaluate, kept
from mmpre.foreseen import foreseen
from mmpre.plugins import find_recipe
from mmpre.processes.stopping import die_with_parent
from mmpre.runs.metrics import read_metrics, seconds_of
from mmpre.runs.options import RunOptions
from mmpre.runs.record import read_record
from mmpre.runs.record_check import MOVED, RunError, differences
from mmpre.runs.run import resume, train


@dataclass(frozen=True, kw_only=True, eq=False)
class ClaimRun:
    """What one arm of a claim is with one seed. `sets` is None for a run that others only start from."""

    arm: str
    folder: Path
    recipe: str
    scale: str
    numbers: Mapping[str, Any]
    steps: int
    flops: float  # of all steps
    options: RunOptions
    sets: Sequence[str] | None = None  # folders of data sets whose tasks are measured; none for the data's own
    kinds: Sequence[str] = ()  # of their tasks that are measured
    after: Path | None = None  # the folder of a run that it starts from

    @property
    def title(self) -> str:
        return f"{self.arm}, seed {self.options.seed}"

    @property
    def log(self) -> Path:
        """What the run's process said."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @cached_property
    def found(self):
        return find_recipe(self.recipe)

    def check(self) -> None:
        """Refuse a folder that holds another run."""
        if not (self.folder / "run.json").exists():
            return
        record, numbers = read_record(self.folder), self.found.numbers(self.scale, self.numbers)
        how = replace(RunOptions(**record["options"]), seed=self.options.seed)
        told = [differences(record, self.found, numbers, how)]
        for name in (name for name in MOVED if name in numbers):
            was, now = record["numbers"].get(name), json.loads(json.dumps(public(numbers[name])))
            told += [f"{name}: {was!r} there, {now!r} here"] if was != now else []
        if other := "; ".join(filter(None, told)):
            raise ValueError(f"claim: {self.folder} was made in another way: {other}; give another --out")

    @property
    def step(self) -> int:
        """How many steps are known to be done."""
        if not (self.folder / "run.json").exists():
            return 0
        path = self.folder / "metrics.jsonl"
        logged = max((line["step"] + 1 for line in read_metrics(path)), default=0) if path.exists() else 0
        outcome = read_record(self.folder).get("outcome", {})
        return self.steps if outcome.get("finished") else min(logged, self.steps)

    @property
    def trained(self) -> bool:
        record = read_record(self.folder) if (self.folder / "run.json").exists() else {}
        return bool(record.get("outcome", {}).get("finished"))

    @property
    def answer(self) -> Mapping[str, Any] | None:
        """What was measured of it, if it was."""
        if self.sets is None or not self.trained:
            return None
        asked = {"data": [], "sets": list(self.sets), "kinds": list(self.kinds)}
        some = [one for one in kept(self.folder) if one["step"] == self.steps and one.get("asked") == asked]
        return some[-1] if some else None

    @property
    def done(self) -> bool:
        return self.trained and (self.sets is None or self.answer is not None)

    def seconds(self) -> float:
        """Time of its steps, held-out losses meanwhile included, up to the last that was logged; over all starts."""
        return seconds_of(read_metrics(self.folder / "metrics.jsonl"))

    def carry_out(self) -> None:
        """Do what is left of it. Raises RunError where a signal stopped it."""
        if not (self.folder / "run.json").exists():
            train(self.recipe, scale=self.scale, out=self.folder, options=self.options, **self.numbers)
        elif not self.trained:
            shards = {name: value for name, value in self.numbers.items() if name in MOVED}  # a record has no secrets
            shards = {name: tuple(value) if isinstance(value, list) else value for name, value in shards.items()}
            resume(self.folder, threads=self.options.threads, **shards)
        if not self.trained:
            raise RunError(f"{self.folder} was stopped at step {self.step} of {self.steps}")
        if self.sets is not None and self.answer is None:
            evaluate(self.folder, untrained=False, bags=False, sets=self.sets, kinds=self.kinds, required=False)

    def as_json(self) -> str:
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "ClaimRun":
        told = json.loads(text)
        after = told["after"] and Path(told["after"])
        return cls(**told | {"folder": Path(told["folder"]), "options": RunOptions(**told["options"]), "after": after})


def main() -> None:
    die_with_parent(signal.SIGTERM)  # which is saved, unlike a kill
    if os.getppid() != int(sys.argv[1]):  # it ended while we began
        sys.exit(1)
    foreseen(ClaimRun.from_json(sys.stdin.read()).carry_out)


if __name__ == "__main__":
    main()
