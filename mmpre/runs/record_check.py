"""What run.json may hold, and what a later start may change. It is data: nothing is used before it is checked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from mmpre.plugins import LoadedRecipe, nearest
from mmpre.runs.options import RunOptions
from mmpre.values import problems as value_problems

FORMAT = 1
MAX_BYTES = 8 << 20
MOVED = ("data", "valid", "sidecar", "valid_sidecar")  # numbers that say where shards are, and may move
_TYPES = {"recipe": dict, "numbers": dict, "options": dict, "data": list}


class RunError(ValueError):
    """A run that cannot be started, resumed or read as asked."""


def checked(record: Any, path: Path) -> dict[str, Any]:
    """The record with every option in it. Raises RunError that lists all that is wrong with it."""
    if not isinstance(record, dict):
        raise RunError(f"{path} must hold an object, got {type(record).__name__}; put back a copy of it")
    if record.get("format") != FORMAT:
        raise RunError(
            f"{path} has format {record.get('format')!r}, this version of mmpre reads format {FORMAT}; use the version "
            "that wrote it, or start a new run"
        )
    begun = "data" in record  # a run of imported weights has none before its first start
    found = [
        f"{name} must be {'an object' if kind is dict else 'a list'}, got {type(record.get(name)).__name__}"
        for name, kind in _TYPES.items()
        if not isinstance(record.get(name), kind) and (begun or name != "data")
    ]
    valid = record.get("valid", [])
    if not isinstance(valid, list):
        found.append(f"valid must be a list, got {type(valid).__name__}")
    rows = [*record.get("data", []), *(one for one in valid if one is not None)] if not found else []
    found = found or _recipe(record["recipe"]) + _options(record["options"]) + _data(rows)
    if not isinstance(record.get("scale", 0), str | None):
        found.append("scale must be a text or null")
    if begun and not isinstance(record.get("environment"), dict):
        found.append("environment must be an object")
    if not _copies(record.get("files", {}), record.get("numbers")):
        found.append("files must name copies in the run's folder, as files/NUMBER/NAME")
    restarts = record.get("restarts", [])
    if not isinstance(restarts, list) or not all(
        isinstance(one, dict) and isinstance(one.get("environment"), dict) for one in restarts
    ):
        found.append("restarts must be a list, each with its environment")
    if found:
        raise RunError(f"{path} is no record of a run: {'; '.join(found)}. Put back a copy of it")
    return record | {"options": asdict(RunOptions(**record["options"]))}


def _copies(files: Any, numbers: Any) -> bool:
    """Whether copies of files lie where a run puts them."""
    if not isinstance(files, dict) or not isinstance(numbers, dict) or not files.keys() <= numbers.keys():
        return False
    names = ((name, str(path).split("/")) for name, path in files.items())
    return all(parts[:-1] == ["files", name] and parts[-1] not in ("", ".", "..") for name, parts in names)


def _recipe(recipe: Mapping[str, Any]) -> list[str]:
    found = []
    # only the name of an installed recipe: a path would let a record say what is run
    if not isinstance(recipe.get("name"), str) or not re.fullmatch(r"\w+", recipe["name"]):
        found.append(f"recipe.name must be a plain name, got {recipe.get('name')!r:.80}")
    found += [f"recipe.{name} must be a text or null" for name in ("digest", "file")
              if not isinstance(recipe.get(name, 0), str | None)]  # fmt: skip
    return found


def _options(options: Mapping[str, Any]) -> list[str]:
    kinds = {field.name: field.type for field in fields(RunOptions)}
    found = [f"options.{name} is none{nearest(name, kinds)}" for name in options if name not in kinds]
    if found:
        return found
    try:
        RunOptions(**options)
    except ValueError as e:
        return [str(e)]
    return []


def _data(data: Sequence[Any]) -> list[str]:
    wanted = {"fingerprint": str, "samples": int, "units": int}
    good = all(isinstance(one, dict) and all(type(one.get(k)) is t for k, t in wanted.items()) for one in data)
    found = [] if good else ["data must say fingerprint, samples and units of each stage's data"]
    for one in data if good else ():
        shards = one.get("shards", [])
        if not isinstance(shards, list) or not all(
            isinstance(row, list) and len(row) == 2 and all(isinstance(word, str) for word in row) for row in shards
        ):
            found.append("data.shards must list names and digests")
        sources = one.get("sources", {})
        if not isinstance(sources, dict) or not all(isinstance(part, dict) for part in sources.values()):
            found.append("data.sources must hold an object for each source")
    return found


def differences(record: Mapping[str, Any], found: LoadedRecipe, numbers: Mapping[str, Any], options: RunOptions) -> str:
    """What another start asks for that a run was not started with, field by field, in words."""
    told = []
    if found.name != record["recipe"]["name"]:
        told.append(f"recipe: {record['recipe']['name']} there, {found.name} here (another model)")
    for name, value in numbers.items():
        if name in MOVED:
            continue
        was = record["numbers"].get(name)
        if was != value:
            told.append(f"{name}: {was!r} there, {value!r} here (changes what is trained)")
    for name, value in ((field.name, getattr(options, field.name)) for field in fields(options)):
        if name in record["options"] and record["options"][name] != value:
            told.append(f"{name}: {record['options'][name]!r} there, {value!r} here ({option_verdict(name, options)})")
    return "; ".join(told)


def option_verdict(name: str, options: RunOptions) -> str:
    """What changing an option of a run would do."""
    if name == "seed":
        return "the data's order, masks and weights"
    if name in ("precision", "exact", "spike", "init") or (name == "threads" and options.exact):
        return "the arithmetic"
    return "harmless: resume takes it"


def check_changes(record: Mapping[str, Any], changes: Mapping[str, Any], run: Path) -> None:
    """Refuse what a resumed run may not change, all of it together, each with a verdict."""
    options, told = record["options"], []
    started = RunOptions(**options)
    known = [*(field.name for field in fields(RunOptions)), *record["numbers"]]
    for name, value in changes.items():
        if name in record["numbers"]:
            if name not in MOVED and value != record["numbers"][name]:
                told.append(f"{name} is a number of the recipe and changes what is trained")
        elif name not in known:
            told.append(f"there is no option {name!r}{nearest(name, known)}")
        elif value != getattr(started, name) and not option_verdict(name, started).startswith("harmless"):
            told.append(f"{name} would change the results ({option_verdict(name, started)})")
    if told:
        raise RunError(f"resume {run}: {'; '.join(told)}. Resume without it, or start a new run for that")
    moved = {name: value for name, value in changes.items() if name in record["numbers"]}
    wrong = value_problems(moved, {"data": tuple[str, ...], "valid": tuple[str, ...], "sidecar": str | None,
                                   "valid_sidecar": str | None})  # fmt: skip
    if wrong:
        raise RunError(f"resume {run}: {'; '.join(wrong)}")


def check_data(what: str, was: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Refuse to go on with other data than a run was trained on or measured by, and say what differs."""
    if was["fingerprint"] == now["fingerprint"]:
        before, here = _sidecars(was), _sidecars(now)
        if any(one is not None and one != here.get(name) for name, one in before.items()):
            raise RunError(
                f"the sidecar of {what} is not the one that {out} began with; put that back, or start a new run"
            )
        if was["units"] != now["units"]:
            raise RunError(
                f"{what} is what {out} began with, but is cut into {now['units']} rows now and "
                f"{was['units']} then, so in another order: by other code, or since samples can be read now that "
                "could not be. Put back the cache with windows-*.npz of then, or start a new run"
            )
        return
    raise RunError(
        f"{what} is not what {out} began with: {was['samples']} samples "
        f"(fingerprint {was['fingerprint'][:12]}) then, {now['samples']} ({now['fingerprint'][:12]}) now"
        f"{_shards_differ(was.get('shards', []), now.get('shards', []))}. "
        "Shards may move, but must be the same, in the same order; start a new run for other data"
    )


def _sidecars(told: Mapping[str, Any]) -> dict[str, Any]:
    """By source; None where there was none, or nobody looked at it."""
    return {name: one.get("sidecars") for name, one in told.get("sources", {"": told}).items()}


def _shards_differ(was: Sequence[Sequence[str]], now: Sequence[Sequence[str]]) -> str:
    if not was or not now:
        return ""
    then, here = {digest: name for name, digest in was}, {digest: name for name, digest in now}
    gone = [name for digest, name in then.items() if digest not in here]
    new = [name for digest, name in here.items() if digest not in then]
    changed = [name for name in gone if name in new]
    parts = {
        "changed": changed,
        "missing": [name for name in gone if name not in changed],
        "new": [name for name in new if name not in changed],
    }
    told = [
        f"{word}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" for word, names in parts.items() if names
    ]
    return "; " + ("; ".join(told) if told else "the same shards in another order, or some given twice")
