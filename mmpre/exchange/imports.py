"""Weights of models that other libraries trained, from a folder of safetensors and a config.json.

What a family's tensors are called, and where ours have their place, is told by plugins in the group `mmpre.imports`:
modules with `accepts(config)` and `translate(source) -> Foreign`. Nothing is ever unpickled.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from mmpre.attention import Attend
from mmpre.network import Network
from mmpre.plugins import survey
from mmpre.runs.starts import FromRun, Start, part
from mmpre.strict_json import JSONError
from mmpre.strict_json import read as read_json
from mmpre.sublayers.attention import Attention
from mmpre.sublayers.convolution import Convolution
from mmpre.sublayers.residual import PreNorm

SHOWN = 8  # names in a message at most


HeadKind = type | tuple[type, str]  # a class of heads, or those of them whose `field` is this one


class ImportedError(ValueError):
    """Weights that cannot be imported, or do not fit."""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A model's tensors by our names.

    `modality` holds those of the modality in the role `role`, `others` those of further ones by role, `encoder` those
    of the encoder, `heads` those of every head (or objective) of a class, or of a class and a field. Of `tables` ours
    may be the first rows: positions, words of a padded vocabulary. `sees` says of each layer what its attention does
    that no tensor tells, in the words of `sees_of`, where the family has layers that differ so.
    """

    role: str
    modality: Mapping[str, Tensor]
    encoder: Mapping[str, Tensor]
    others: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    heads: Mapping[HeadKind, Mapping[str, Tensor]] = field(default_factory=dict)
    tables: frozenset[str] = frozenset()
    attention_heads: int
    eps: float
    pre_norm: bool
    causal_convolutions: bool | None = None  # whether those look back alone, where there are any
    sees: Sequence[str] = ()


class Source:
    """A folder's configuration, and its tensors, each of which is taken once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.config: Mapping[str, Any] = read_json(folder / "config.json")
        except JSONError as e:
            raise ImportedError(
                f"{folder} is no model that can be imported: {e}; wanted a folder with config.json and safetensors, as "
                "transformers' save_pretrained and timm's save_for_hf write it"
            ) from None
        if not isinstance(self.config, dict):
            kind = type(self.config).__name__
            raise ImportedError(f"{folder}/config.json must hold an object, got {kind}; put back a copy of it")
        self.places = _tensor_files(folder)
        self.taken: set[str] = set()

    def number(self, name: str) -> int:
        """A whole number of the configuration."""
        value = self.config.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ImportedError(f"{self.folder}/config.json: {name} must be a whole number, got {value!r}")
        return value

    def __contains__(self, name: str) -> bool:
        return name in self.places

    def take(self, name: str) -> Tensor:
        """A tensor in float32."""
        if name not in self.places:
            raise ImportedError(f"{self.folder}: there is no tensor {name}; it has {_some(self.places)}")
        self.taken.add(name)
        path, stored = self.places[name]
        with safetensors.safe_open(path, "pt") as file:
            return file.get_tensor(stored).float()

    def left(self) -> list[str]:
        """Names that nobody took."""
        return sorted(self.places.keys() - self.taken)

    def expect_left(self, *prefixes: str) -> None:
        """Refuse a model with parts that were not taken and do not begin like this: it is another function."""
        if strange := [name for name in self.left() if not name.startswith(prefixes)]:
            raise ImportedError(f"{self.folder} has parts that mmpre's networks have not: {_some(strange)}")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an import did: tensors taken, ours that keep their first values, theirs not taken, and other differences."""

    path: str
    family: str
    filled: int
    missing: list[str]
    left: list[str]
    notes: list[str]

    def lines(self) -> list[str]:
        told = [f"{self.path} ({self.family}): {self.filled} tensors taken"]
        told += [f"keeps its first values, is not in it: {_some(self.missing)}"] if self.missing else []
        told += [f"in it and not taken: {_some(self.left)}"] if self.left else []
        return told + self.notes


@dataclass(frozen=True)
class Imported:
    """Start a network (`into`, by its name in `Recipe.module()`) from a folder of transformers or timm.

    Where the recipe calls the modality otherwise than the family does, `role` names it.
    """

    path: str
    into: str = "network"
    role: str | None = None

    def fill(self, module: nn.Module) -> str:
        return "\n  ".join(fill(module, Path(self.path), self.into, self.role).lines())


def start_of(path: str) -> Start:
    """What to start a network from, by its folder: a run, or a model of transformers or timm."""
    return FromRun(run=path) if (Path(path) / "run.json").exists() else Imported(path)


@torch.no_grad()
def fill(module: nn.Module, folder: Path, into: str = "network", role: str | None = None) -> Report:
    """Copy a folder's weights into a recipe's modules. Raises ImportedError that lists all that does not fit."""
    source = Source(folder)
    name, family = find_family(source)
    foreign, net = family.translate(source), part(module, into)
    if not isinstance(net, Network):
        raise ImportedError(f"import: {into!r} is a {type(net).__name__}; only a Network can be started so")
    role = role or foreign.role
    if role not in net.modalities:
        raise ImportedError(
            f"import: {folder} ({name}) is for the role {role!r}, the recipe's network has "
            f"{', '.join(net.modalities)}; name the one that it is for (--role)"
        )
    if lacking := sorted(foreign.others.keys() - net.modalities.keys()):
        raise ImportedError(
            f"import: {folder} ({name}) has parts for the roles {', '.join(lacking)}, which the recipe's network has "
            f"not; it has {', '.join(net.modalities)}"
        )
    places = [(net.modalities[role], foreign.modality), (net.encoder, foreign.encoder)]
    places += [(net.modalities[other], some) for other, some in foreign.others.items()]
    places += [(one, some) for kind, some in foreign.heads.items() for one in heads_of(module, net, kind)]
    prefixes = {id(inner): label for label, inner in module.named_modules()}
    problems, notes = _differences(net, foreign)
    ready: list[tuple[Tensor, Tensor]] = []
    done: set[int] = set()
    for inner, some in places:
        own = dict(inner.named_parameters(remove_duplicate=False)) | dict(inner.named_buffers())
        for label, theirs in some.items():
            full = f"{prefixes[id(inner)]}.{label}"
            if label not in own:
                (problems if inner is net.encoder else notes).append(f"{full} has no place in the recipe")
                continue
            ours = own[label]
            if theirs.shape != ours.shape and label in foreign.tables and len(theirs) > len(ours):
                notes.append(f"{full}: the first {len(ours)} of {len(theirs)} rows")
                theirs = theirs[: len(ours)]
            if theirs.shape != ours.shape:
                problems.append(f"{full} has shape {list(ours.shape)}, theirs {list(theirs.shape)}")
                continue
            ready.append((ours, theirs))
            done.add(id(ours))
    lost = [name for name, p in net.encoder.named_parameters() if id(p) not in done and name not in foreign.encoder]
    problems += [f"{into}.encoder.{name} is not in it" for name in lost]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ImportedError(f"import: {folder} ({name}) does not fit: {'; '.join(problems[:SHOWN])}{more}")
    for ours, theirs in ready:
        ours.copy_(theirs)
    missing = [name for name, parameter in module.named_parameters() if id(parameter) not in done]
    return Report(path=str(folder), family=name, filled=len(ready), missing=missing, left=source.left(), notes=notes)


def find_family(source: Source) -> tuple[str, ModuleType]:
    """The plugin that knows a folder's architecture, with its name."""
    good, bad = survey("import")
    for name, family in good.items():
        if family.accepts(source.config):
            return name, family
    came = source.config.get("model_type") or source.config.get("architecture")
    broken = f"; disabled: {'; '.join(bad.values())}" if bad else ""
    raise ImportedError(
        f"{source.folder}: nothing here knows the architecture {came!r}; known are {', '.join(good) or 'none'}{broken}"
    )


def heads_of(module: nn.Module, net: Network, kind: HeadKind) -> list[nn.Module]:
    """The modules of a class (with a field), but not those that are tied to the tables of another network."""
    own = {id(parameter) for parameter in net.parameters()}
    kind, named = kind if isinstance(kind, tuple) else (kind, None)
    found = [one for one in module.modules() if type(one) is kind and named in (None, getattr(one, "field", None))]
    return [one for one in found if not hasattr(one, "table") or id(one.table.weight) in own]


def _differences(net: Network, foreign: Foreign) -> tuple[list[str], list[str]]:
    """What shapes do not tell: (what makes it another function, what makes small differences)."""
    problems, notes = [], []
    heads = {one.heads for one in net.encoder.modules() if isinstance(one, Attention)}
    if heads != {foreign.attention_heads}:
        problems.append(f"the recipe has {_numbers(heads)} attention heads, theirs {foreign.attention_heads}")
    if any(isinstance(one, PreNorm) for one in net.encoder.modules()) != foreign.pre_norm:
        problems.append(f"theirs has norms {'before' if foreign.pre_norm else 'after'} sublayers, the recipe otherwise")
    causal = {one.before == one.kernel - 1 for one in net.encoder.modules() if isinstance(one, Convolution)}
    if foreign.causal_convolutions is not None and causal != {foreign.causal_convolutions}:
        how = "back alone" if foreign.causal_convolutions else "to both sides"
        problems.append(f"theirs has convolutions that look {how}, the recipe otherwise")
    eps = {one.eps for one in net.encoder.modules() if isinstance(one, nn.LayerNorm)}
    if eps != {foreign.eps}:
        notes.append(f"LayerNorms have eps {_numbers(eps)}, theirs {foreign.eps}: states will differ a little")
    for number, (ours, theirs) in enumerate(zip(sees_of(net.encoder), foreign.sees, strict=False)):
        if ours != theirs:
            problems.append(f"attention of layer {number} sees {ours}, theirs {theirs}")
    return problems, notes


def sees_of(encoder: nn.Module) -> list[str]:
    """What each layer's attention does that no tensor tells, in words."""
    return [
        sees(one.within, None if one.rotary is None else one.rotary.theta)
        for one in encoder.modules()
        if isinstance(one, Attention)
    ]


def sees(within: Attend | None, theta: float | None) -> str:
    """The words for an attention that is narrowed to `within`, with rotary embeddings of base `theta`."""
    return f"{within or 'whole rows'}" + ("" if theta is None else f" by rotary embeddings of base {theta:g}")


def _tensor_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """The file of each tensor, and its name there: one file, or the several that an index names.

    LayerNorms that were converted from TensorFlow have gamma and beta, which are called weight and bias here.
    """
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        told = read_json(index)
        if not isinstance(told, dict) or not isinstance(told.get("weight_map"), dict):
            raise ImportedError(
                f"{index} must hold an object with a weight_map of names and files; put back a copy of it"
            )
        names = set(told["weight_map"].values())
        if strange := [name for name in names if not re.fullmatch(r"[A-Za-z0-9._-]+\.safetensors", str(name))]:
            raise ImportedError(f"{index} names files that may not be: {strange}")
        files = [folder / name for name in sorted(names)]
    elif single.exists():
        files = [single]
    else:
        raise ImportedError(_no_safetensors(folder))
    places = {}
    for file in files:
        try:
            with safetensors.safe_open(file, "pt") as opened:
                for name in opened.keys():
                    today = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
                        "LayerNorm.beta", "LayerNorm.bias"
                    )
                    places[today] = (file, name)
        except (OSError, safetensors.SafetensorError) as e:
            raise ImportedError(f"{file} cannot be read: {e}; get the file again") from None
    return places


def _no_safetensors(folder: Path) -> str:
    pickled = sorted(path.name for kind in ("*.bin", "*.pth", "*.pt", "*.ckpt") for path in folder.glob(kind))
    if not pickled:
        return f"{folder} holds no model.safetensors"
    return (
        f"{folder} holds {', '.join(pickled)} but no model.safetensors. Pickled files can run any code when they are "
        'opened, so mmpre does not open them. If you trust it, convert it once: python -c "import torch, '
        f"safetensors.torch as s; s.save_file({{k: v.clone() for k, v in torch.load('{pickled[0]}', "
        "weights_only=True).items()}, 'model.safetensors')\""
    )


def _some(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _numbers(some: set) -> str:
    return " and ".join(map(str, sorted(some))) or "no"
