"""run.json: what a run was asked for, what it began with, how often it was taken up again, and what came of it."""

import json
import logging
import os
import platform
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmpre.aside import file_aside
from mmpre.data.ledger import Ledger
from mmpre.data.mixture import sources
from mmpre.data.remote import public
from mmpre.plugins import LoadedRecipe
from mmpre.processes.peers import digest_of_code
from mmpre.processes.processes import Processes
from mmpre.recipe import Recipe
from mmpre.runs.commit import commit
from mmpre.runs.record_check import MAX_BYTES, RunError, check_data, checked
from mmpre.strict_json import JSONError
from mmpre.strict_json import read as read_json

log = logging.getLogger(__name__)
KEPT_BYTES = 64 << 20  # of a file that a run keeps a copy of
DATA = {"data": "the data", "valid": "the held-out data"}  # what a record describes by stage


def read_record(run: Path) -> dict[str, Any]:
    """The record of a run. Raises RunError that lists all that is wrong with it."""
    path = run / "run.json"
    if not path.exists():
        raise RunError(f"{run} is not a run: it has no run.json; `mmpre train` makes one")
    try:
        return checked(read_json(path, max_bytes=MAX_BYTES), path)
    except JSONError as e:
        raise RunError(f"{e}; the record of a run is needed to go on with it: put back a copy of it") from None


def make_folder(out: Path, recipe: Recipe) -> None:
    """Make a run's folder, or refuse it before any work."""
    place, urls = os.path.realpath(out), [url for stage in recipe.stages for url in stage.valid]
    named = [source for stage in recipe.stages for source in sources(stage.data, stage.sidecar).values()]
    for url in [*urls, *(url for source in named for url in source.data)]:
        if place in (os.path.realpath(url), os.path.dirname(os.path.realpath(url))):
            raise RunError(f"{out} is the folder of the shards {url}; give the run a folder of its own by --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as e:
        what = e.strerror or str(e)
        raise RunError(f"{out} cannot be written ({what}); give another folder by --out, or mend that") from None


def open_record(run: Path) -> dict[str, Any]:
    """A run's record, its numbers naming the copies of files that the run keeps."""
    record = read_record(run)
    return record | {"numbers": record["numbers"] | {n: str(run / f) for n, f in record.get("files", {}).items()}}


def begin(
    out: Path, record: Mapping[str, Any], found: LoadedRecipe, told: Mapping[str, Sequence[Any]], processes: Processes
) -> None:
    """Write down what a new run begins with; `told` is what is said of its data, held-out data and their sidecars."""
    if processes.rank == 0:
        try:
            if found.is_file:
                (out / "recipe.py").write_bytes(found.path.read_bytes())
            kept = _keep_files(out, record["numbers"])
            _write(out, {**record, "files": kept, **told, "environment": environment(processes)})
        except OSError as e:
            raise RunError(f"the record of {out} cannot be written ({e}); make room, or give another --out") from None


def take_up(
    out: Path, record: Mapping[str, Any], told: Mapping[str, Sequence[Any]], processes: Processes,
    moved: Mapping[str, Any],
) -> None:  # fmt: skip
    """Refuse to go on with other data, write down where it has moved; tell what has changed around the run since it was
    last worked on."""
    for name, what in DATA.items():
        was, now = record.get(name), told[name]
        if was is None:  # written by a version that did not look at it
            continue
        if len(was) != len(now):
            raise RunError(
                f"the recipe of {out} has {len(now)} stages now, it had {len(was)}; go on with the recipe as it was, "
                "or start a new run"
            )
        for number, (one, other) in enumerate(zip(was, now, strict=True)):
            if one and other:
                check_data(f"{what} of stage {number}", one, other, out)
    if processes.rank == 0 and moved:
        stored = read_record(out)
        try:
            _write(out, {**stored, "numbers": {**stored["numbers"], **moved}})
        except OSError as e:  # a full disk: training comes first
            log.warning("%s: where its data is now was not written down (%s)", out, e)
    if processes.rank == 0:
        now = environment(processes)
        last = (record.get("restarts") or [record])[-1]["environment"]
        for name in ("python", *packages(), "code"):
            if last.get(name) != now[name]:
                log.warning(
                    "%s was %s when %s was last worked on and is %s now: the order of the data stays the same, numbers "
                    "may differ in their last bits", name, last.get(name), out, now[name],
                )  # fmt: skip


def restart(out: Path, *, step: int, processes: Processes) -> None:
    """Write down that a run goes on from a step."""
    record = read_record(out)
    record.setdefault("restarts", []).append({"at": _now(), "step": step, "environment": environment(processes)})
    try:
        _write(out, record)
    except OSError as e:  # a full disk: training comes first
        log.warning("%s: the restart was not written down (%s)", out, e)


def conclude(out: Path, ledger: Ledger, *, step: int, finished: bool, skipped: int) -> str:
    """Write down what came of a run so far; return it as a line for people."""
    record = read_record(out)
    causes = Counter[str]()
    for (cause, _, _), count in ledger.table.items():
        causes[cause] += count
    restarts = len(record.get("restarts", []))
    record["outcome"] = {
        "at": _now(), "finished": finished, "step": step, "rows": ledger.seen, "holes": dict(causes),
        "skipped_steps": skipped, "restarts": restarts, "ledger": str(ledger.path) if causes else None,
    }  # fmt: skip
    try:
        _write(out, record)
    except OSError as e:
        log.warning("%s: the outcome was not written down (%s)", out, e)
    told = f"{ledger.summary()}; {skipped} steps skipped; {restarts} restarts"
    return f"{told}; {ledger.path} names the holes" if causes else told


def _keep_files(out: Path, numbers: Mapping[str, Any]) -> dict[str, str]:
    """Copy the small files that numbers name into the run, so that it outlives them; where each copy is, by number."""
    kept = {}
    for name, value in numbers.items():
        path = Path(value) if isinstance(value, str) else Path()
        inside = path / "tokenizer.json"  # as transformers keeps one
        if isinstance(value, str) and "tokenizer" in name and inside.is_file():
            path = inside
        if path.suffix and path.is_file() and path.stat().st_size <= KEPT_BYTES:
            kept[name] = f"files/{name}/{path.name}"
            (out / kept[name]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out / kept[name])
    return kept


def packages() -> dict[str, str]:
    return {name: version(name) for name in ("mmpre", "torch", "numpy", "tokenizers", "safetensors")}


def environment(processes: Processes) -> dict[str, Any]:
    return {
        "python": sys.version.split()[0], "machine": platform.platform(), "processes": processes.world,
        "device": str(processes.device), "threads": torch.get_num_threads(), "code": digest_of_code(),
        "commit": commit(), **packages(),
    }  # fmt: skip


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write(out: Path, record: Mapping[str, Any]) -> None:
    """Where secrets of urls are needed again, `resume` is given the urls anew."""
    with file_aside(out / "run.json") as aside:
        aside.write_text(json.dumps({**record, "numbers": public(record["numbers"])}, indent=2) + "\n")
