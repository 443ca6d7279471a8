"""From a function's signature to the command line: names, types, defaults, and the comment beside each as its help."""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import tyro

from mmpre.plugins import LoadedRecipe, PluginError, find_recipe
from mmpre.runs.options import RunOptions


def asked_of(rest: list[str], prog: str) -> tuple[Any, dict[str, Any]]:
    """A recipe, and what was asked of it: scale, out, options and the numbers that differ."""
    found = find_recipe(rest[0])
    scale, flags = take(rest[1:], "--scale")
    kind = recipe_class(found, found.defaults(scale), RunOptions)
    scales = ", ".join(found.scales) or "none"
    told = re.sub(r"\n+(?=\S)", "\n\n", found.doc.strip())  # tyro joins the lines of a paragraph
    about = f"{told}\n\nScales (--scale): {scales}. Shown are the defaults of {scale or 'the paper'}."
    asked = tyro.cli(kind, args=flags, prog=f"{prog} {rest[0]}", description=about)
    numbers, options = split(asked, RunOptions)
    changes = changed(numbers, found.defaults(scale))
    told_of = {"scale": scale, "out": asked.out, "options": checked(found, changes, options)}
    return found.path if found.is_file else found.name, told_of | changes


def take(words: list[str], flag: str) -> tuple[str | None, list[str]]:
    """Take `flag VALUE` or `flag=VALUE` out of the words."""
    for i, word in enumerate(words):
        if word == flag:
            if i + 1 == len(words):
                raise PluginError(f"{flag} needs a value")
            return words[i + 1], words[:i] + words[i + 2 :]
        if word.startswith(f"{flag}="):
            return word.split("=", 1)[1], words[:i] + words[i + 1 :]
    return None, words


def comments(source: str) -> dict[str, str]:
    """The comment at the end of each `name: type = default,  # comment` line of a signature or a class."""
    return dict(re.findall(r"^[ \t]*(\w+)[ \t]*:[^#\n]*#[ \t]*(.*\S)", source, flags=re.MULTILINE))


def recipe_class(
    found: LoadedRecipe, defaults: Mapping[str, Any], options: type, *,
    out: str | None = "the run's folder; by default runs/NAME-SCALE-TIME",
) -> type:  # fmt: skip
    """A dataclass of a recipe's numbers, `out` where it has a help, and further options, for tyro."""
    told = _source_comments(found.function)
    fields: list[tuple] = [("out", _helped(out, str | None), dataclasses.field(default=None))] if out else []
    hints = {name: p.annotation for name, p in inspect.signature(found.function).parameters.items()}
    for name, kind in hints.items():
        kind = type(defaults[name]) if kind is inspect.Parameter.empty else kind
        fields.append((name, _helped(told.get(name, ""), kind), dataclasses.field(default=_tuple(defaults[name]))))
    run_told = _source_comments(options)
    for field in dataclasses.fields(options):
        if field.name in hints or field.name == "out":
            raise PluginError(
                f"recipe {found.name}: its number {field.name!r} has the name of an option of the command"
            )
        kind = _helped(run_told.get(field.name, ""), field.type)
        fields.append((field.name, kind, dataclasses.field(default=field.default)))
    return dataclasses.make_dataclass(f"{found.name}_numbers", fields, kw_only=True)


def split(asked: Any, options: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was parsed, as (the recipe's numbers, the run's options)."""
    values = {field.name: getattr(asked, field.name) for field in dataclasses.fields(asked)}
    names = {field.name for field in dataclasses.fields(options)}
    numbers = {name: value for name, value in values.items() if name not in names and name != "out"}
    return numbers, {name: value for name, value in values.items() if name in names}


def changed(numbers: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers that differ from those that hold where nothing is said."""
    return {name: value for name, value in numbers.items() if value != _tuple(defaults[name])}


def checked(found: LoadedRecipe, changes: Mapping[str, Any], options: Mapping[str, Any]) -> RunOptions:
    """The run's options, after all that is wrong with them and with the recipe's numbers was told together."""
    told = []
    try:
        found.check(changes, found.defaults(None))
    except PluginError as e:
        told.append(str(e))
    try:
        made = RunOptions(**options)
    except ValueError as e:
        told.append(str(e))
    if told:
        raise PluginError("; ".join(told))
    return made


def _helped(text: str, kind: Any) -> Any:
    return Annotated[kind, tyro.conf.arg(help=text)] if text else kind


def _source_comments(thing: Callable[..., Any] | type) -> dict[str, str]:
    try:
        return comments(inspect.getsource(thing))
    except (OSError, TypeError):
        return {}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
