"""`mmpre export`: a run's network as a folder that another library loads.

What a library's class is, and how its folder is written, is told by plugins in the group `mmpre.exports`: modules with
an `exporter`. A folder gets its name only after its tensors were read back by the architecture's import plugin and
found equal bit for bit, and after the library had loaded it and given the same states.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mmpre.aside import folder_aside
from mmpre.exchange.imports import Source, find_family, heads_of
from mmpre.network import Network
from mmpre.plugins import survey
from mmpre.recipe import Recipe
from mmpre.runs.run import load


class ExportError(ValueError):
    """A run that cannot be exported as asked."""


@dataclass(frozen=True)
class Check:
    """What was compared with the library that loaded the folder, the largest difference, and what is allowed."""

    what: str
    difference: float
    limit: float

    @property
    def good(self) -> bool:
        return self.difference <= self.limit  # NaN is not

    def line(self) -> str:
        return f"{self.what}: largest difference {self.difference:.3g}, allowed {self.limit:.3g}"


@runtime_checkable
class Exporter(Protocol):
    """Writes folders of one class of one library. `target` names the class, for people."""

    target: str

    def differs(self, recipe: Recipe) -> list[str] | None:
        """What of the network the class has not, in words: nothing where it fits, None for another kind of network."""
        ...

    def write(self, recipe: Recipe, folder: Path) -> list[str]:
        """Write the folder; what a user should know about it, in lines."""
        ...

    def check(self, recipe: Recipe, folder: Path) -> list[Check]:
        """Load the folder by the library and compare."""
        ...


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and how it was found to be the same."""

    folder: Path
    target: str
    step: int
    checks: list[Check]
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        return [
            f"{self.folder}: {self.target}, from step {self.step}",
            *(one.line() for one in self.checks),
            *self.notes,
        ]


def export(run: Path | str, out: Path | str, *, to: str | None = None, best: bool = False) -> Exported:
    """Write a run's network to a new folder `out`, as the class that the exporter `to` knows, or the first that fits.

    Raises ExportError where no class is the same function, and where what was written is not the same.
    """
    out = Path(out)
    if out.exists():
        raise ExportError(f"{out} is there already; remove it, or give another --out")
    opened = load(run, best=best)
    recipe, step = opened.recipe, opened.checkpoint.step
    recipe.module().eval()
    name, exporter, others = _choose(recipe, to, str(run))
    with folder_aside(out) as aside, torch.no_grad():
        notes = exporter.write(recipe, aside)
        same, left = same_tensors(recipe, aside)
        notes += [f"{', '.join(left)} of the modality: the class has no place for it"] if left else []
        checks = [same, *exporter.check(recipe, aside)]
        if wrong := [one.line() for one in checks if not one.good]:
            raise ExportError(
                f"{run} was not exported: {exporter.target} gives something else: {'; '.join(wrong)}; use the "
                "run itself meanwhile (`mmpre embed`), and report this to whoever wrote the exporter"
            )
        about = {
            "recipe": opened.record["recipe"]["name"], "scale": opened.record["scale"], "step": step,
            "seed": opened.record["options"]["seed"], "class": exporter.target,
            "differences": {one.what: one.difference for one in checks},
        }  # fmt: skip
        (aside / "mmpre.json").write_text(json.dumps(about, indent=2) + "\n")
    if others:
        notes = [*notes, f"written as {name}; {', '.join(others)} would fit too (--to)"]
    return Exported(folder=out, target=exporter.target, step=step, checks=checks, notes=notes)


def same_tensors(recipe: Recipe, folder: Path) -> tuple[Check, list[str]]:
    """Read a folder's tensors back by the architecture's import plugin, and compare them with the network's.

    Returns with it the names of the modality's parameters that have no place there. Raises ExportError where one of
    the encoder's has none.
    """
    net, source = recipe.network, Source(folder)
    foreign = find_family(source)[1].translate(source)
    module = recipe.module()
    by_role = {foreign.role: foreign.modality, **foreign.others} if len(net.modalities) > 1 else None
    modalities = [(one, foreign.modality if by_role is None else by_role[role]) for role, one in net.modalities.items()]
    parts = [(net.encoder, foreign.encoder), *modalities]
    parts += [(head, some) for kind, some in foreign.heads.items() for head in heads_of(module, net, kind)]
    worst, left = 0.0, []
    for ours, theirs in parts:
        for name, parameter in ours.named_parameters(remove_duplicate=False):
            if name in theirs:
                worst = max(worst, _apart(parameter, theirs[name], in_table=name in foreign.tables))
            elif ours is net.encoder:
                raise ExportError(f"export: the encoder's {name} has no place in the folder")
            elif any(ours is one for one, _ in modalities):
                left.append(name)
    return Check("tensors", worst, 0.0), left


def _apart(ours: Tensor, theirs: Tensor, *, in_table: bool) -> float:
    if in_table and len(ours) > len(theirs):
        ours = ours[len(ours) - len(theirs) :]  # rows that no token uses come first
    if ours.shape != theirs.shape:
        return math.inf
    return 0.0 if torch.equal(ours.float(), theirs) else float((ours.float() - theirs).abs().max())


def _choose(recipe: Recipe, to: str | None, run: str) -> tuple[str, Exporter, list[str]]:
    """The exporter that was asked for, or the first by name that fits, and the others that would."""
    good, bad = survey("export")
    if to is not None and to not in good:
        why = f": it is disabled, {bad[to]}" if to in bad else f"; there are {', '.join(good) or 'none'}"
        raise ExportError(f"there is no exporter {to!r}{why}")
    known: Mapping[str, Exporter] = {name: module.exporter for name, module in good.items()}
    told = {name: one.differs(recipe) for name, one in known.items() if to in (None, name)}
    fits = [name for name, differences in told.items() if differences == []]
    if fits:
        return fits[0], known[fits[0]], fits[1:]
    way_out = (
        f"its features can be had by `mmpre embed {run}`, and the network itself in Python by "
        f"mmpre.load({run!r}).recipe.network"
    )
    why = [f"{known[name].target}: {'; '.join(some)}" for name, some in told.items() if some]
    if not why:
        what = _kind(recipe.network)
        wanted = f"the exporter {to!r} is" if to else f"the exporters ({', '.join(known) or 'none'}) are"
        raise ExportError(f"{run} cannot be exported: {wanted} not for {what}; {way_out}")
    raise ExportError(
        f"{run} cannot be exported, for no class there is the same function. {'. '.join(why)}. But {way_out}"
    )


def _kind(network: nn.Module) -> str:
    if not isinstance(network, Network):
        return f"a {type(network).__name__}"
    return "a network that reads " + " and ".join(f"{r} ({type(m).__name__})" for r, m in network.modalities.items())
