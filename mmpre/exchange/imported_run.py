"""`mmpre import`: a run at step 0 whose weights another library trained."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmpre.data.ledger import Ledger
from mmpre.data.remote import public
from mmpre.exchange.imports import Report, fill
from mmpre.plugins import find_recipe
from mmpre.runs import checkpoint
from mmpre.runs.options import RunOptions
from mmpre.runs.record import RunError
from mmpre.runs.run import build, new_record


def import_model(
    folder: Path | str, recipe: str | Path, *, scale: str | None = None, out: Path | str | None = None,
    options: RunOptions | None = None, into: str = "network", role: str | None = None, **numbers: Any,
) -> Report:  # fmt: skip
    """Fill a recipe's network from a folder of transformers or timm and, with `out`, write it as a run.

    Such a run can be evaluated and exported at once and trained by `mmpre resume`, which then writes down its data.
    Without `out`, nothing is written: the report tells how the two differ.
    """
    options = options or RunOptions()
    found = find_recipe(recipe)
    record = new_record(found, scale, found.numbers(scale, numbers), options)
    built = build(found, record["numbers"], options.seed)
    module = built.module()
    report = fill(module, Path(folder), into, role)
    if out is not None:
        _write(Path(out), module, record | {"imported": {"from": str(folder), "family": report.family}})
        if found.is_file:
            (Path(out) / "recipe.py").write_bytes(found.path.read_bytes())
    return report


def _write(out: Path, module: torch.nn.Module, record: Mapping[str, Any]) -> None:
    if (out / "run.json").exists():
        raise RunError(f"{out} already holds a run; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    state = {
        "stage": 0, "step": 0, "best": {"step": None, "loss": None}, "skipped": 0, "skipped_in_a_row": 0,
        "held_out_due": False, "guard": {},
        "ledger": Ledger(out / "ledger.jsonl", limit=record["options"]["max_holes"]).state(),
        "optimizer": {"plain": {}, "tensors": 0},
    }  # fmt: skip
    tensors = {"model": dict(module.state_dict(keep_vars=True)), "optimizer": {}}
    checkpoint.save(out / "checkpoints", 0, tensors, state)
    (out / "run.json").write_text(json.dumps({**record, "numbers": public(record["numbers"])}, indent=2) + "\n")
