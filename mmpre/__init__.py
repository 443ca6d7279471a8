"""mmpre: pretrain an encoder on unlabelled data of any modality.

import mmpre
run = mmpre.train("uniter", scale="tiny", data=("shards/train",), sidecar="shards/regions/train")
network = mmpre.load(run).recipe.network
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmpre.data.mixture import Source
    from mmpre.recipe import Recipe, Stage, Task
    from mmpre.runs.options import RunOptions
    from mmpre.runs.run import load, resume, train
    from mmpre.view import OtherSample, View

__all__ = ["OtherSample", "Recipe", "RunOptions", "Source", "Stage", "Task", "View", "load", "resume", "train"]

_homes = {
    "mmpre.data.mixture": ("Source",),
    "mmpre.runs.options": ("RunOptions",),
    "mmpre.recipe": ("Recipe", "Stage", "Task"),
    "mmpre.runs.run": ("load", "resume", "train"),
    "mmpre.view": ("OtherSample", "View"),
}


def __getattr__(name: str) -> object:
    """Import on first use: `mmpre --help` must not wait for torch."""
    for home, names in _homes.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'mmpre' has no attribute {name!r}")
