"""What a run's folder tells of it, without its weights: what was asked, what it ran on, how far it came."""

import fcntl
import inspect
import json
import logging
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from mmpre.plan import plan
from mmpre.plugins import LoadedRecipe, PluginError, file_digest, find_recipe
from mmpre.report.chart import Mark
from mmpre.runs.command import again, plain
from mmpre.runs.metrics import read_metrics, seconds_of
from mmpre.runs.record_check import RunError
from mmpre.runs.run import read_record

log = logging.getLogger(__name__)
EXAMPLES = 5  # holes and skipped steps that are named one by one
MARKED = 30  # skipped steps that are marked in charts


@dataclass(frozen=True)
class Account:
    """One run. `label` names it among several, and is empty for a single one; `stages` are their steps, if known."""

    path: Path
    record: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    label: str = ""
    stages: Sequence[int] = ()
    found: LoadedRecipe | None = field(default=None, compare=False)

    @cached_property
    def steps(self) -> list[Mapping[str, Any]]:
        """Logged steps that were done; numbers that were written as text (NaN, infinity) are numbers again."""
        return [_numbers(line) for line in self.lines if "valid" not in line and not line.get("skipped")]

    @cached_property
    def valid(self) -> list[Mapping[str, Any]]:
        """Held-out losses; they are taken after their step."""
        return [_numbers(line) for line in self.lines if "valid" in line]

    @cached_property
    def skipped(self) -> list[Mapping[str, Any]]:
        return [line for line in self.lines if line.get("skipped")]

    @property
    def recipe(self) -> str:
        return self.record["recipe"]["name"]

    @cached_property
    def state(self) -> tuple[str, str]:
        """A word for how the run stands, and what it means."""
        outcome, step = self.record.get("outcome"), self.step
        of = f"of {self.total:,}" if self.total else ""
        if _locked(self.path / "lock"):
            return "running", f"a process is working on it; {step:,} {of} steps are logged"
        if outcome and outcome["finished"]:
            return "finished", f"all {outcome['step']:,} steps were done"
        if outcome and outcome["step"] >= step:
            return "stopped", f"after {outcome['step']:,} {of} steps, and saved; mmpre resume goes on"
        if not self.lines:
            return "not begun", "nothing is logged"
        return (
            "ended early",
            f"the last logged step is {step:,} {of}, and nothing was said of an end; mmpre resume goes on",
        )

    @cached_property
    def step(self) -> int:
        """How many steps were done, as far as it is known."""
        last = max((line["step"] + 1 for line in self.lines if "valid" not in line), default=0)
        return max(last, self.record.get("outcome", {}).get("step", 0)) if not self._ahead else last

    @property
    def _ahead(self) -> bool:
        """Whether it went on after the outcome was written, and has not told another one yet."""
        restarts, outcome = self.record.get("restarts", []), self.record.get("outcome")
        return bool(outcome) and any(one.get("at", "") > outcome["at"] for one in restarts)

    @property
    def total(self) -> int | None:
        steps = sum(self.stages) or self.record["numbers"].get("steps")
        return steps if isinstance(steps, int) else None

    @cached_property
    def best(self) -> Mapping[str, Any] | None:
        """The newest held-out line that was the best so far, in its stage."""
        return next((line for line in reversed(self.valid) if line.get("best")), None)

    @cached_property
    def commands(self) -> list[tuple[str, str]]:
        """How to run it again and how to go on with it: what each does, and the command."""
        said = [("run it again", again(self.record, self.found))]
        if self.state[0] not in ("finished", "running"):
            said.append(("go on with it", shlex.join(["mmpre", "resume", str(self.path)])))
        return said

    @cached_property
    def source(self) -> tuple[str, str] | None:
        """The text of the recipe's file, and a note where it is no longer the one that was run."""
        kept = self.path / "recipe.py"
        path = kept if kept.is_file() else self.found.path if self.found else None
        if path is None or not path.is_file():
            return None
        same = file_digest(path) == self.record["recipe"].get("digest")
        return path.read_text(encoding="utf-8", errors="replace"), "" if same else "changed since this run was started"

    @cached_property
    def versions(self) -> list[tuple[str, str]]:
        environment = self.record.get("environment", {})
        known = ("device", "processes", "threads", "machine", "python", "commit", "code")
        rest = [name for name in environment if name not in known]
        return [(name, str(environment[name])) for name in (*known, *rest) if environment.get(name) not in (None, "")]

    @cached_property
    def data(self) -> list[tuple[str, str]]:
        """The shards of each stage: what they are, and their digests."""
        told, numbers = [], self.record["numbers"]
        for name in ("data", "sidecar", "valid", "valid_sidecar"):
            if numbers.get(name):
                where = numbers[name]
                told.append((name.replace("_", " "), where if isinstance(where, str) else " ".join(map(str, where))))
        for number, one in enumerate(self.record.get("data", [])):
            told.append((f"stage {number + 1}" if len(self.record["data"]) > 1 else "held in it", _held(one)))
        told += [(f"copy of {name}", path) for name, path in self.record.get("files", {}).items()]
        return told

    @cached_property
    def shards(self) -> list[str]:
        """Every shard with the beginning of its digest."""
        return [f"{digest}  {name}" for name, digest in _shards(self.record.get("data", []))]

    @cached_property
    def holes(self) -> dict[str, int]:
        """Lost samples by cause, as the ledger names them (a run that goes on has told no sum yet)."""
        told = self.record.get("outcome", {}).get("holes")
        if told is not None and not self._ahead:
            return dict(told)
        causes = Counter(hole.get("cause", "?") for hole in self._ledger())
        return dict(causes.most_common())

    @cached_property
    def lost(self) -> list[tuple[str, str]]:
        """Some of the holes: where each is, and why."""
        return [
            (f"{hole.get('shard')}: {hole.get('key')}" + (f".{hole['member']}" if hole.get("member") else ""),
             str(hole.get("detail", "")))
            for hole in islice(self._ledger(), EXAMPLES)
        ]  # fmt: skip

    @property
    def rows(self) -> int | None:
        """Rows that were seen, holes included, where the run has told it."""
        return None if self._ahead else self.record.get("outcome", {}).get("rows")

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @cached_property
    def marks(self) -> list[Mark]:
        """What happened at a step: stages that began, restarts, the first skipped steps."""
        begun = list(accumulate(self.stages))[:-1]
        return [
            *(Mark(step, "stage", f"stage {i} begins at step {step:,}") for i, step in enumerate(begun, 2)),
            *(Mark(one["step"], "restart", f"taken up again at step {one['step']:,}") for one in self.restarts),
            *(Mark(line["step"], "skip", f"step {line['step']:,} was skipped") for line in self.skipped[:MARKED]),
        ]

    @property
    def restarts(self) -> list[Mapping[str, Any]]:
        return [one for one in self.record.get("restarts", []) if isinstance(one.get("step"), int)]

    @cached_property
    def seconds(self) -> float:
        """Time spent on steps, over all sessions, as far as it is logged."""
        return seconds_of(self.steps)

    @cached_property
    def flops(self) -> float | None:
        """Of the steps that were done, as `mmpre plan` counts them; None where it cannot, as without the recipe."""
        if self.found is None:
            return None
        which = self.found.path if self.found.is_file else self.found.name
        try:
            stages = plan(which, **self.record["numbers"])["stages"]
        except (ValueError, TypeError, OSError, RuntimeError, KeyError) as e:
            log.warning("%s: its FLOPs are not told, for it cannot be planned (%s)", self.path, e)
            return None
        flops, left = 0.0, self.step
        for one in stages:
            flops += one["flops_in_all"] * min(left, one["steps"]) / one["steps"]  # on a ramp, as if steps were alike
            left = max(0, left - one["steps"])
        return flops

    def _ledger(self):
        if not self.ledger.exists():
            return
        with self.ledger.open("rb") as file:
            for raw in file:
                try:
                    line = json.loads(raw)
                except ValueError:
                    continue
                if isinstance(line, dict):
                    yield line


def read(path: Path, label: str = "") -> Account:
    """The account of a run's folder. Raises RunError where the folder is no run."""
    if not path.is_dir():
        raise RunError(f"{path} is not a run: there is no such folder; `mmpre train` makes one")
    record = read_record(path)
    metrics = path / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.exists() else []
    return Account(path, record, lines, label, found=_recipe(path, record))


def settings(account: Account) -> dict[str, Any]:
    """Everything that was chosen for a run, by name: what two runs are compared by."""
    told: dict[str, Any] = {"recipe": account.recipe, "scale": account.record.get("scale")}
    told |= {name: plain(value) for name, value in account.record["numbers"].items()}
    told |= {f"option {name}": value for name, value in account.record["options"].items()}
    told["recipe file's digest"] = (account.record["recipe"].get("digest") or "")[:16]
    for number, one in enumerate(account.record.get("data", [])):
        told[f"data of stage {number + 1}"] = _held(one)
    environment = account.record.get("environment", {})
    return told | {f"ran on {name}": value for name, value in environment.items()}


def _recipe(path: Path, record: Mapping[str, Any]) -> LoadedRecipe | None:
    """The run's recipe, where it can still be found; the account is told without it otherwise."""
    kept, name = path / "recipe.py", record["recipe"]["name"]
    try:
        return find_recipe(kept, name=name) if record["recipe"]["file"] else find_recipe(name)
    except PluginError:
        return None


def _numbers(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: one if name in ("task", "cause", "keys") else _numbers(one) for name, one in value.items()}
    return float(value) if value in ("nan", "inf", "-inf") else value


def _held(one: Mapping[str, Any]) -> str:
    units = f", cut into {one['units']:,} rows" if one.get("units") != one.get("samples") else ""
    return f"{one.get('samples', 0):,} samples{units}, fingerprint {str(one.get('fingerprint', ''))[:16]}"


def _shards(data: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Every shard and its digest, once; those of several sources with their sources' names."""
    found = {(name, digest): None for one in data for name, digest in one.get("shards", [])}
    for one in data:
        for source, part in one.get("sources", {}).items():
            found |= {(f"{source}/{name}", digest): None for name, digest in part.get("shards", [])}
    return list(found)


def _locked(path: Path) -> bool:
    """Whether a process holds the lock of a run; nothing is changed by looking."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def about(found: LoadedRecipe | None) -> str:
    """The first line of a recipe's docstring."""
    return inspect.cleandoc(found.doc).split("\n")[0] if found and found.doc else ""
