"""What a claim came to, for people: a table, and a page in Markdown with a picture and how it was made."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mmpre.aside import file_aside
from mmpre.claims import OWN
from mmpre.markdown import spread
from mmpre.markdown import table as as_table
from mmpre.report.comparison import Comparison, picture


def write(told: Mapping[str, Any], folder: Path, name: str) -> None:
    """NAME.json, NAME.svg and NAME.md in a folder, each whole or not there."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"json": json.dumps(told, indent=1, ensure_ascii=False) + "\n", "svg": drawn(told), "md": page(told, name)}
    for suffix, text in files.items():
        with file_aside(folder / f"{name}.{suffix}") as aside:
            aside.write_text(text, encoding="utf-8")


def drawn(told: Mapping[str, Any]) -> str:
    """Every comparison, as one picture."""
    return picture([
        Comparison(
            f"{one['measure']}{_kind(one)}", (told["recipe"], one["against"]), (one["own"], one["other"]),
            one["better by"], one["low"], one["high"], one["margin"], one["verdict"],
        )
        for one in told["compared"]
    ])  # fmt: skip


def page(told: Mapping[str, Any], name: str) -> str:
    """The page in Markdown; its picture is NAME.svg beside it."""
    made = told["made"]
    first = "a first look (`--quick`)" if told["quick"] else f"scale `{told['scale']}`"
    compared = [
        [one["against"], f"{one['measure']}{_kind(one)}", spread(one["own"], 4), spread(one["other"], 4),
         f"{one['better by']:.4f} ({one['low']:.4f} to {one['high']:.4f})", f"**{one['verdict']}**"]
        for one in told["compared"]
    ]  # fmt: skip
    arms = [
        [told["recipe"] if arm == OWN else arm, _changed(one["numbers"]), f"{one['steps']:,}", f"{one['flops']:.3g}",
         f"{np.mean(one['seconds']):.0f}"]
        for arm, one in told["arms"].items()
    ]  # fmt: skip
    parts = [
        f"# {told['recipe']}: {told['says']}",
        f"{told['seeds']} seeds, {first}. {_equal(told)}",
        as_table(["against", "measure", told["recipe"], "other", "better by (95 %)", "verdict"], compared),
        f"![Each seed's values, their means, and the difference with its interval]({name}.svg)",
        f"Rule: {told['rule']}.",
        *_not_measured(told),
        "What was trained, the same data order, masks and first weights in all arms of a seed:",
        as_table(["arm", "what differs", "steps", "FLOPs", "seconds of training"], arms),
    ]
    if (before := told["before"]) is not None:
        parts.append(
            f"Each seed's arms start from a run of `{before['recipe']}` at scale `{before['scale']}`: "
            f"{before['steps']:,} steps, {before['flops']:.3g} FLOPs, {np.mean(before['seconds']):.0f} seconds"
            f"{'; ' + _changed(before['numbers']) if before['numbers'] else ''}."
        )
    numbers = _changed(told["numbers"])
    parts += [
        f"All arms: {numbers}." if numbers else "",
        f"```\n{made['command']}\n```",
        f"Commit {', '.join(made['commits'])}; {made['machine']}, {made['at once']} runs at once, "
        f"{made['threads']} thread(s) each, torch {made['torch']}; {made['date']}.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(told: Mapping[str, Any]) -> Table:
    """Each comparison in a row: means and spread over seeds, the difference, and the verdict."""
    title = f"{told['recipe']}: {told['says']} ({told['seeds']} seeds, equal {told['equal']})"
    caption = " ".join([_equal(told), f"{told['rule']}.", *_not_measured(told)])
    shown = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in ("against", "measure", "own", "other", "better by", "steps", "FLOPs", "seconds", "verdict"):
        shown.add_column(column)
    for one in told["compared"]:
        arms = [told["arms"][arm] for arm in (OWN, one["against"])]
        shown.add_row(
            one["against"], one["measure"], spread(one["own"], 4), spread(one["other"], 4),
            f"{one['better by']:.4f} ({one['low']:.4f} to {one['high']:.4f})",
            " / ".join(f"{arm['steps']:,}" for arm in arms), " / ".join(f"{arm['flops']:.3g}" for arm in arms),
            " / ".join(f"{np.mean(arm['seconds']):.0f}" for arm in arms), one["verdict"],
        )  # fmt: skip
    return shown


def _not_measured(told: Mapping[str, Any]) -> list[str]:
    return [f"Not measured: {what} ({why})." for what, why in told.get("not measured", {}).items()]


def _equal(told: Mapping[str, Any]) -> str:
    """What is the same in all arms, in words."""
    off = 100 * told["flops differ by"]
    flops = f"equal FLOPs (within {off:.1f} %)" if told["equal"] == "flops" else f"FLOPs within {off:.1f} %"
    steps = "equal steps" if told["same steps"] else "steps differ"
    words = [flops, steps] if told["equal"] == "flops" else [steps, flops]
    pinned = [name for name, arm in told["arms"].items() if "steps" in arm["numbers"]]
    words += [f"but for {' and '.join(pinned)}"] if pinned else []
    text = ", ".join(words)
    return f"{text[0].upper()}{text[1:]}."


def _kind(one: Mapping[str, Any]) -> str:
    words = ["lower is better"] if one["less"] else []
    words += [f"may be worse by {one['margin']:g}"] if one["margin"] else []
    return f" ({', '.join(words)})" if words else ""


def _changed(numbers: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in numbers.items())


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else "on" if value is True else str(value)
