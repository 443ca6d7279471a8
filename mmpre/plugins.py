"""Finding recipes, modalities and data sets: by entry point, or a recipe by the path of its file.

Only names that the user gave are imported. A file is loaded by its own path alone; its folder does not join the
import path, so nothing beside it can stand in for a package.
"""

import difflib
import hashlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from mmpre.processes.process_state import unchanged
from mmpre.values import problems

GROUPS = {"recipe": "mmpre.recipes", "modality": "mmpre.modalities", "data set": "mmpre.data_sets",
          "benchmark": "mmpre.benchmarks", "import": "mmpre.imports", "export": "mmpre.exports"}  # fmt: skip


class PluginError(ValueError):
    """A recipe, modality or data set that cannot be found or used."""


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe's function, its scales, and the file it stands in with that file's digest."""

    name: str
    function: Callable[..., Any]
    scales: Mapping[str, Mapping[str, Any]]
    path: Path | None
    is_file: bool
    doc: str
    claim: Any = None  # what the paper says is better than what (mmpre/claims/claim.py)

    @property
    def digest(self) -> str | None:
        return file_digest(self.path) if self.path else None

    def defaults(self, scale: str | None) -> dict[str, Any]:
        """Every number of the recipe at a scale (None: as the signature says, which is the paper's)."""
        if scale is not None and scale not in self.scales:
            raise PluginError(f"recipe {self.name} has no scale {scale!r}{nearest(scale, self.scales)}")
        plain = {name: p.default for name, p in inspect.signature(self.function).parameters.items()}
        missing = [name for name, value in plain.items() if value is inspect.Parameter.empty]
        if missing:
            raise PluginError(f"recipe {self.name}: every argument needs a default, {', '.join(missing)} have none")
        return plain | dict(self.scales[scale] if scale else {})

    def numbers(self, scale: str | None, changes: Mapping[str, Any]) -> dict[str, Any]:
        """The numbers of a run: a scale's, with changes. Raises PluginError for unknown names, all of them together."""
        chosen = self.defaults(scale)
        self.check(changes, chosen)
        return json.loads(json.dumps(chosen | dict(changes), default=str))

    def check(self, numbers: Mapping[str, Any], known: Collection[str]) -> None:
        """Refuse names that the recipe does not have and values that are not of its types, all of them together."""
        wrong = [f"there is no number {name!r}{nearest(name, known)}" for name in numbers if name not in known]
        kinds = {name: p.annotation for name, p in inspect.signature(self.function).parameters.items()}
        wrong += problems({name: value for name, value in numbers.items() if name in known}, kinds)
        if wrong:
            raise PluginError(f"recipe {self.name}: {'; '.join(wrong)}")

    def build(self, numbers: Mapping[str, Any]) -> Any:
        """Call the recipe. What a library says of numbers that cannot work is told with the recipe and the place."""
        try:
            with unchanged(f"recipe {self.name}", draws=True):
                return self.function(**numbers)
        except Exception as e:
            last = traceback.extract_tb(e.__traceback__)[-1]
            if isinstance(e, ValueError) and "site-packages" not in last.filename and "<" not in last.filename:
                raise  # a piece of the recipe that says what it wanted
            ours = [frame for frame in traceback.extract_tb(e.__traceback__) if "site-packages" not in frame.filename]
            place = f"{Path(ours[-1].filename).name}, line {ours[-1].lineno}" if ours else "?"
            first = str(e).strip().split("\n")[0][:200]
            raise PluginError(
                f"recipe {self.name} cannot be built with these numbers: {type(e).__name__}: {first} ({place}); "
                f"look at the numbers that were changed, or at the recipe there"
            ) from e


def find_recipe(recipe: str | Path | Callable[..., Any], *, name: str | None = None) -> LoadedRecipe:
    """A recipe by its name, by the path of its file (the function is named like the file, or `name`), or itself."""
    if callable(recipe):
        module = sys.modules[recipe.__module__]
        path = Path(module.__file__) if getattr(module, "__file__", None) else None
        return LoadedRecipe(recipe.__name__, recipe, getattr(module, "scales", {}), path, False, module.__doc__ or "",
                            getattr(module, "claim", None))  # fmt: skip
    if str(recipe).endswith(".py"):
        path = Path(recipe)
        module = load_file(path, "recipe")
        return _from_module(module, name or path.stem, path, is_file=True)
    found = _find("recipe", str(recipe))
    module = _import(found)
    return _from_module(module, found.name, Path(module.__file__), is_file=False)


def find_data_set(name: str) -> ModuleType:
    """The module that builds a data set, by name or by the path of its file: `build(out, ...)`, `description`,
    `licence`, `size`, and for `mmpre data list`, where it has them, `packages` and `tasks`."""
    module = load_file(Path(name), "data set") if name.endswith(".py") else _import(_find("data set", name))
    if not callable(getattr(module, "build", None)):
        raise PluginError(f"{module.__file__} must define build(out, ...), which writes the data set's shards to `out`")
    return module


def find_modality(name: str) -> ModuleType:
    """The module of a modality, by name or by the path of its file; it may define `corpus(sample)`, the texts that a
    tokenizer of it is trained on, and `plain_reader(sample)`, a reader of ordinary settings."""
    return load_file(Path(name), "modality") if name.endswith(".py") else _import(_find("modality", name))


def find_benchmark(name: str) -> ModuleType:
    """The module of a benchmark: `run(settings)` (see mmpre.benchmark) and `description`."""
    return _import(_find("benchmark", name))


def file_digest(path: Path) -> str | None:
    """The SHA-256 of a file; None where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def names(kind: str) -> list[str]:
    return sorted({point.name for point in entry_points(group=GROUPS[kind])})


def survey(kind: str) -> tuple[dict[str, ModuleType], dict[str, str]]:
    """All plugins of a kind, imported, and the reason for each that is disabled (it failed, or its name is taken)."""
    good: dict[str, ModuleType] = {}
    bad: dict[str, str] = {}
    for point in sorted(entry_points(group=GROUPS[kind]), key=lambda point: (point.name, point.value)):
        if point.name in good:
            bad[f"{point.name} ({point.value})"] = f"its name is taken by {good[point.name].__name__}"
            continue
        try:
            good[point.name] = _import(point)
        except PluginError as e:
            bad[point.name] = str(e)
    return good, bad


def _find(kind: str, name: str) -> EntryPoint:
    points = {point.value: point for point in entry_points(group=GROUPS[kind], name=name)}
    if len(points) > 1:
        who = ", ".join(f"{value} ({_owner(point)})" for value, point in sorted(points.items()))
        raise PluginError(f"the {kind} {name!r} is announced by several packages: {who}; uninstall all but one")
    if not points:
        known = names(kind)
        hint = ", or give the path of a .py file" if kind != "benchmark" else ""
        raise PluginError(f"there is no {kind} {name!r}{nearest(name, known)}{hint}")
    return next(iter(points.values()))


def _owner(point: EntryPoint) -> str:
    return f"package {point.dist.name}" if point.dist else "an unknown package"


def _import(point: EntryPoint) -> ModuleType:
    try:
        with unchanged(f"plugin {point.name} ({point.value})"):
            return importlib.import_module(point.value)
    except (Exception, SystemExit) as e:
        raise PluginError(f"plugin {point.name} ({point.value}) cannot be imported: {type(e).__name__}: {e}") from e


def load_file(path: Path, kind: str) -> ModuleType:
    if not path.is_file():
        raise PluginError(f"there is no {kind} file {path}")
    name = f"mmpre_file_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # workers unpickle its classes by this name
    try:
        with unchanged(f"{kind} file {path}"):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:
        del sys.modules[name]
        raise PluginError(f"{kind} file {path} fails when it is loaded: {type(e).__name__}: {e}") from e
    return module


def load_again(name: str, path: str) -> ModuleType:
    """A module that another process loaded from a file, under its name there."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from_module(module: ModuleType, name: str, path: Path, *, is_file: bool) -> LoadedRecipe:
    function = getattr(module, name, None)
    if not callable(function) and is_file and name.isidentifier():  # a copy of a recipe, under a name of its own
        made = [one for one in vars(module).values() if _makes_recipes(one, module)]
        function = made[0] if len(made) == 1 else None
    if not callable(function):
        way_out = "" if name.isidentifier() else f", so rename it: {name!r} is no name of a function"
        raise PluginError(f"{path} must define a function {name}(...) that returns an mmpre.Recipe{way_out}")
    return LoadedRecipe(name, function, getattr(module, "scales", {}), path, is_file, module.__doc__ or "",
                        getattr(module, "claim", None))  # fmt: skip


def _makes_recipes(one: object, module: ModuleType) -> bool:
    """Whether it is a function of that module which says that it returns a Recipe."""
    returns = getattr(one, "__annotations__", {}).get("return") if inspect.isfunction(one) else None
    return getattr(returns, "__name__", returns) == "Recipe" and one.__module__ == module.__name__


def nearest(name: str, known: Collection[str]) -> str:
    """The known name that was meant, or all there are, for the end of a message."""
    near = difflib.get_close_matches(name, list(known), 1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known)) or 'none'}"
