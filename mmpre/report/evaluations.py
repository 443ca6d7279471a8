"""What `mmpre eval` has left in a run's folder, as tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmpre.evaluation.evaluate import KEPT, kept
from mmpre.strict_json import JSONError

COLUMNS = ("rows", "trained", "untrained", "better by", "without a network", "chance")
Cell = tuple[str, str]  # a value, and what is said small beside it
EMPTY: Cell = ("", "")


@dataclass(frozen=True)
class Table:
    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell]]]
    notes: Sequence[str] = ()


def tables(run: Path) -> tuple[list[Table], list[str]]:
    """A table for each evaluation, the newest first, and what had to be left out."""
    try:
        return [_table(one) for one in reversed(kept(run))], []
    except (JSONError, KeyError, TypeError, ValueError, AttributeError) as e:
        return [], [f"{run / KEPT}: it is not what mmpre eval writes ({type(e).__name__}: {e}); run it again"]


def _table(answer: Mapping[str, Any]) -> Table:
    others = [_by_name(answer, "untrained"), dict(answer.get("gain") or {}), _by_name(answer, "trivial")]
    rows = [
        (one["name"], [(f"{one['n']:,}", ""), _cell(one), *(_cell(some.get(one["name"])) for some in others),
                       _plain(one.get("chance"))])
        for one in answer["trained"]["results"]
    ]  # fmt: skip
    before = (answer.get("untrained") or {}).get("tasks", {})
    seen = answer["trained"].get("rows", 0)
    for task, values in answer["trained"]["tasks"].items():
        for name, value in values.items():
            if name != "loss" and value == values.get("loss"):
                continue  # a single term is the loss
            was = before.get(task, {}).get(name)
            rows.append((f"{task}, {name}", [(f"{seen:,}", ""), _plain(value), _plain(was), EMPTY, EMPTY, EMPTY]))
    used = [i for i in range(len(COLUMNS)) if any(cells[i] != EMPTY for _, cells in rows)]
    where = " ".join([*answer.get("data", ()), *answer.get("sets", ())])
    return Table(
        f"step {answer['step']:,}, on {where}", ["measure", *(COLUMNS[i] for i in used)],
        [(name, [cells[i] for i in used]) for name, cells in rows], _notes(answer),
    )  # fmt: skip


def _notes(answer: Mapping[str, Any]) -> list[str]:
    protocol = answer.get("protocol") or {}
    when = f", measured {answer['date']}" if answer.get("date") else ""
    notes = [f"Small: {protocol.get('interval', '95 percent bootstrap intervals')}. Seed {answer.get('seed')}{when}."]
    if protocol.get("choices"):
        notes.append(f"Chosen: {protocol['choices']}.")
    notes += [f"Known of {name}: {text}" for name, text in (answer.get("known") or {}).items()]
    return notes + [f"Not measured: {name} ({why})" for name, why in (answer.get("not measured") or {}).items()]


def _by_name(answer: Mapping[str, Any], which: str) -> dict[str, Mapping[str, Any]]:
    return {one["name"]: one for one in (answer.get(which) or {}).get("results", ())}


def _cell(one: Mapping[str, Any] | None) -> Cell:
    return EMPTY if one is None else (f"{one['value']:.3f}", f"{one['low']:.3f} to {one['high']:.3f}")


def _plain(value: float | None) -> Cell:
    return EMPTY if value is None else (f"{float(value):.3f}", "")
