"""Where several runs differ."""

from collections.abc import Sequence
from typing import Any

from mmpre.report.account import Account, settings


def differences(runs: Sequence[Account]) -> list[tuple[str, list[Any]]]:
    """Every setting, piece of data or version that is not the same in all runs, with its value in each."""
    told = [settings(run) for run in runs]
    names = dict.fromkeys(name for one in told for name in one)
    rows = [(name, [one.get(name, "") for one in told]) for name in names]
    return [(name, [_text(v) for v in values]) for name, values in rows if any(v != values[0] for v in values)]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)
