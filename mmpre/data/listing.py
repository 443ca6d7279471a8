"""`mmpre data list`: the data sets that mmpre can build."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from mmpre.plugins import survey


def known_sets() -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """What each data set says of itself, and the reason for each that is disabled."""
    good, bad = survey("data set")
    sets = {
        name: {
            "about": module.description, "licence": module.licence, "size": module.size,
            "packages": [{"registry": one.registry, "name": one.name} for one in getattr(module, "packages", ())],
            "good_for": [task.told() for task in getattr(module, "tasks", ())],
        }
        for name, module in good.items()
    }  # fmt: skip
    return sets, bad


def tell(sets: Mapping[str, Mapping[str, Any]], bad: Mapping[str, str]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, told in sets.items():
        table.add_row(f"[bold]{name}[/]", f"[bold]{told['about']}[/]")
        table.add_row("", f"{_packages(told['packages'])}, {told['size']}" if told["packages"] else told["size"])
        table.add_row("", f"licence: {told['licence']}")
        for task in told["good_for"]:
            table.add_row("", f"{task['kind']}: {task['about']}")
        table.add_row("", "")
    for name, reason in bad.items():
        table.add_row(name, f"disabled: {reason}")
    Console(highlight=False).print(table)


def _packages(packages: list[dict[str, str]]) -> str:
    by: dict[str, list[str]] = {}
    for one in packages:
        by.setdefault(one["registry"], []).append(one["name"])
    return "; ".join(f"{registry}: {', '.join(names)}" for registry, names in by.items())
