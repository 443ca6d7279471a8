"""Checkpoints: folders of safetensors and JSON that are whole or are not there, and are verified before they are used.

A save is written aside, synced to disk, given a manifest with every file's digest last, and renamed. The digests are of
what was in memory, and nothing older is deleted before the new one was read back. Loading takes the newest one whose
digests fit; nothing is ever unpickled.
"""

import difflib
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from mmpre.aside import sync
from mmpre.strict_json import JSONError
from mmpre.strict_json import read as read_json
from mmpre.training.gradients import like

log = logging.getLogger(__name__)
FORMAT = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, or cannot be used."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. Tensors are read when asked for, by the name of their file."""

    path: Path
    step: int
    state: Mapping[str, Any]
    aliases: Mapping[str, Mapping[str, str]]

    def needs(self, files: Collection[str], state: Collection[str]) -> None:
        """Raise CheckpointError where one of these files of tensors or parts of the state is absent."""
        absent = sorted({*files} - {*self.aliases}) + sorted({*state} - {*self.state})
        if absent:
            raise CheckpointError(
                f"checkpoint {self.path} lacks {', '.join(absent)}, without which the run would go on differently; it "
                "was changed, or written by another version: use another checkpoint"
            )

    @cached_property
    def tensors(self) -> Mapping[str, dict[str, Tensor]]:
        return _Files(self)


class _Files(Mapping):
    """Each file is read when it is first asked for: an evaluation needs the weights, not what the optimizer keeps."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.read = checkpoint, {}

    def __getitem__(self, stem: str) -> dict[str, Tensor]:
        if stem not in self.read:
            aliases = self.checkpoint.aliases[stem]
            tensors = safetensors.torch.load_file(self.checkpoint.path / f"{stem}.safetensors")
            self.read[stem] = tensors | {name: tensors[first] for name, first in aliases.items()}
        return self.read[stem]

    def __iter__(self) -> Iterator[str]:
        return iter(self.checkpoint.aliases)

    def __len__(self) -> int:
        return len(self.checkpoint.aliases)


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any],
    *, keep: int = 2, protect: Collection[int] = (),
) -> Path:  # fmt: skip
    """Write `step-<step>`; then keep the newest `keep` valid ones and those whose steps are in `protect`.

    `tensors` maps a file's name to its tensors; names of one tensor (tied weights) are stored once. Raises
    CheckpointError where the disk is full or refuses; older checkpoints are then as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = {stem: _untied(some) for stem, some in tensors.items()}
    size = sum(t.numel() * t.element_size() for some, _ in stored.values() for t in some.values())
    free = shutil.disk_usage(folder).free
    if free < size * 1.2 + (1 << 20):
        raise CheckpointError(f"{folder}: a checkpoint needs {size * 1.2:,.0f} bytes, {free:,} are free; make room")
    aside = folder / f".tmp-{step}-{secrets.token_hex(4)}"
    try:
        aside.mkdir()
        files = {}
        for stem, (some, _) in stored.items():
            name = f"{stem}.safetensors"
            files[name] = _write(aside / name, safetensors.torch.save(some))
        files[STATE] = _write(aside / STATE, json.dumps(state, allow_nan=False).encode())
        manifest = {
            "format": FORMAT, "step": step, "files": files,
            "aliases": {stem: aliases for stem, (_, aliases) in stored.items()},
        }  # fmt: skip
        whole = {"manifest": manifest, "blake2b": _digest_of(manifest)}
        _write(aside / MANIFEST, json.dumps(whole, indent=1).encode())
        sync(aside)
        path = path_of(folder, step)
        before = _put_by(path) if path.exists() else None  # the same step again, after a resume from an older one
        os.rename(aside, path)
        sync(folder)
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)
    except (OSError, safetensors.SafetensorError) as e:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"{folder}: step {step} was not saved ({e}); older checkpoints are untouched") from e
    _retire(path, keep, protect)
    return path


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies; a damaged one is reported and passed over. None where there are none.

    Raises CheckpointError where all are damaged: to begin again from nothing must be said by a person.
    """
    found = _steps(folder)
    for path in reversed(found):
        try:
            return load(path)
        except CheckpointError as e:
            log.error("%s; trying the one before it", e)
    if found:
        raise CheckpointError(
            f"none of the {len(found)} checkpoints in {folder} is whole; put one back from a copy, or delete them all "
            "to begin again at step 0"
        )
    return None


def of_run(run: Path, *, best: bool = False) -> Checkpoint:
    """A run's newest checkpoint, or the one with the best held-out loss if there is one."""
    folder = run / "checkpoints"
    newest = latest(folder)
    if newest is None:
        raise CheckpointError(f"{folder} holds no valid checkpoint; the run has not saved yet")
    best_step = newest.state["best"]["step"]
    if best and best_step is None:
        log.warning("%s has no held-out loss to tell its best weights by; the newest are taken", run)
    if best and best_step is not None and best_step != newest.step:
        return load(path_of(folder, best_step))
    return newest


def load(path: Path) -> Checkpoint:
    """Verify a checkpoint and open it. Raises CheckpointError that names what is wrong."""
    try:
        whole = read_json(path / MANIFEST)
        manifest = whole["manifest"]
        if whole["blake2b"] != _digest_of(manifest):
            raise JSONError("it does not fit its own digest")
    except (JSONError, KeyError, TypeError) as e:
        raise CheckpointError(f"checkpoint {path} has no valid manifest: {e}; use another one") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        came = manifest.get("format") if isinstance(manifest, dict) else "none"
        told = f"checkpoint {path} has format {came}, this version of mmpre reads {FORMAT}"
        raise CheckpointError(f"{told}; use the version that wrote it")
    try:
        step, aliases, files = manifest["step"], manifest["aliases"], dict(manifest["files"])
        wanted = {STATE, *(f"{stem}.safetensors" for stem in aliases)}
        if set(files) != wanted or not isinstance(step, int):
            told = f"checkpoint {path}: its files are {sorted(files)}, wanted {sorted(wanted)}"
            raise CheckpointError(f"{told}; copy it again")
        for name, about in files.items():
            _verify(path, name, about)
        return Checkpoint(path, step, read_json(path / STATE), aliases)
    except OSError as e:
        raise CheckpointError(f"checkpoint {path} cannot be read ({e.strerror or e}); use another one") from None
    except (KeyError, TypeError, AttributeError, ValueError, JSONError) as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {path}: the manifest lacks what it must hold ({e!r})") from None


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def sweep(folder: Path) -> None:
    """Remove what killed saves and deletions left; for the owner of the run's lock."""
    for left in [*folder.glob(".tmp-*"), *folder.glob(".del-*")]:
        shutil.rmtree(left, ignore_errors=True)


def restore_model(module: nn.Module, tensors: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Load weights after all names and shapes were compared. Raises CheckpointError that lists the differences."""
    wanted = module.state_dict()
    problems = []
    for name in sorted(wanted.keys() - tensors.keys()) if strict else ():
        near = difflib.get_close_matches(name, tensors.keys() - wanted.keys(), 1)
        problems.append(f"{name} is missing" + (f" (is it {near[0]}?)" if near else ""))
    problems += [f"{name} is not in the model" for name in sorted(tensors.keys() - wanted.keys())] if strict else []
    for name in sorted(wanted.keys() & tensors.keys()):
        if wanted[name].shape != tensors[name].shape:
            problems.append(f"{name} has shape {list(tensors[name].shape)}, the model's {list(wanted[name].shape)}")
    if problems:
        more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(
            f"the checkpoint does not fit the model: {'; '.join(problems[:12])}{more}; build it as it was when that "
            "was saved, or name another checkpoint"
        )
    module.load_state_dict({n: like(t, wanted[n]) for n, t in tensors.items() if n in wanted}, strict=strict)


def flatten_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by "parameter name/entry", and what is no tensor as JSON."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    tensors, plain = {}, {}
    for parameter, state in optimizer.state.items():
        for entry, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{names[parameter]}/{entry}"] = value
            else:
                plain[f"{names[parameter]}/{entry}"] = value
    return tensors, {"plain": plain, "tensors": len(tensors)}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, module: nn.Module, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Put back what `flatten_optimizer` took, by parameter names. Raises CheckpointError for what does not fit."""
    if meta.get("tensors") != len(tensors) or "plain" not in meta:
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(tensors)} tensors, {meta.get('tensors')} when it was saved; it would "
            "go on differently without them: use another checkpoint"
        )
    parameters = dict(module.named_parameters())
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    state: dict[nn.Parameter, dict[str, Any]] = {}
    for label, value in [*tensors.items(), *meta["plain"].items()]:
        name, _, entry = label.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or id(parameter) not in owned:
            raise CheckpointError(
                f"the checkpoint's optimizer has a state for {name}, which is not trained here; go on with the recipe "
                "as it was, or start a new run from the weights"
            )
        if isinstance(value, Tensor):
            if value.ndim and value.shape != parameter.shape:
                shapes = f"{list(value.shape)}, the parameter {list(parameter.shape)}"
                raise CheckpointError(
                    f"the optimizer's {label} has shape {shapes}; go on with the numbers as they were, or start a new "
                    "run from the weights"
                )
            # a step counter goes where the optimizer makes it: for torch's fused ones, as moments, to the parameter
            here = value.to(parameter.device) if optimizer.defaults.get("fused") else value.clone()
            value = like(value, parameter) if value.ndim else here
        state.setdefault(parameter, {})[entry] = value
    optimizer.state.clear()
    optimizer.state.update(state)


def _untied(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each storage once, and which names are other names of which."""
    first: dict[tuple, str] = {}
    kept, aliases = {}, {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        place = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.numel() and place in first:
            aliases[name] = first[place]
            continue
        first[place] = name
        tensor = tensor.cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()  # others lie in its storage too, which safetensors does not take
        storages.add(tensor.untyped_storage().data_ptr())
        kept[name] = tensor
    return kept, aliases


def _write(path: Path, content: bytes) -> dict[str, Any]:
    """Write a file and wait for the disk, while another thread takes the digest; returns what a manifest says of it."""
    with ThreadPoolExecutor(1) as other, path.open("xb") as file:
        digest = other.submit(_digest_of_bytes, content)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return {"size": len(content), "blake2b": digest.result()}


def _digest_of(manifest: Any) -> str:
    return _digest_of_bytes(json.dumps(manifest, sort_keys=True).encode())


def _digest_of_bytes(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()


def _verify(path: Path, name: str, about: Mapping[str, Any]) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_]+\.(safetensors|json)", name):
        raise CheckpointError(f"checkpoint {path}: the manifest names a file {name!r}, which may not be; remove it")
    file = path / name
    if file.is_symlink() or not file.is_file():
        raise CheckpointError(f"checkpoint {path}: {name} is missing; copy it again, or use another one")
    size = file.stat().st_size
    if size != about["size"]:
        told = f"checkpoint {path}: {name} has {size} bytes, its manifest says {about['size']}"
        raise CheckpointError(f"{told}; copy it again")
    if _digest(file) != about["blake2b"]:
        raise CheckpointError(f"checkpoint {path}: {name} does not fit its digest: damaged; copy it again")


def _steps(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def _retire(new: Path, keep: int, protect: Collection[int]) -> None:
    """Read the new checkpoint back, then delete all but the newest `keep` valid ones and the protected.

    Raises CheckpointError where the new one is damaged; nothing is deleted then. Two are read at a time, since training
    waits for it.
    """
    others, wanted = [path for path in reversed(_steps(new.parent)) if path != new], max(keep, 1) - 1
    if len(others) <= wanted:
        load(new)
        return
    with ThreadPoolExecutor(2) as readers:
        reading = readers.submit(load, new)
        checks = [readers.submit(_valid, path) for path in others[:wanted]]
        reading.result()
    valid = sum(check.result() for check in checks)
    for path in others[wanted:]:
        if valid < wanted:
            valid += _valid(path)
        elif int(path.name[5:]) not in protect:
            shutil.rmtree(_put_by(path), ignore_errors=True)


def _valid(path: Path) -> bool:
    try:
        load(path)
        return True
    except CheckpointError as e:
        log.error("%s", e)
        return False


def _put_by(path: Path) -> Path:
    aside = path.with_name(f".del-{path.name}-{secrets.token_hex(4)}")
    os.rename(path, aside)
    return aside
