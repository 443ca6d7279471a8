"""What `mmpre data derive` can compute: what a file's `derive(samples)` makes, or the states of a run's network."""
# B rows, N tokens of the packed batch, D model width

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmpre.data.derive import DeriveError, Deriver
from mmpre.data.sample import Sample
from mmpre.plugins import load_file
from mmpre.states import RunStates

POOLS = ("mean", "none")


def from_file(path: Path) -> Deriver:
    """The function `derive(samples) -> [{name: tensor}, ...]` of a file, which is code that the user trusts."""
    module = load_file(path, "derive")
    if not callable(getattr(module, "derive", None)):
        raise DeriveError(f"{path} must define derive(samples), which returns a mapping of names to tensors for each")
    return Deriver(module.derive, f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}")


def from_run(
    run: Path, *, layer: int | None = None, pool: str = "mean", roles: Sequence[str] = (), best: bool = False
) -> Deriver:
    """The states of a run's network, clean rows in evaluation mode: `states`, and `lengths` of the sample's rows.

    `layer` is counted as `Encoder` counts (0: what comes in), None for the network's result. `pool` mean gives one
    state for each row (a window, or the whole sample), none gives all tokens' states, row after row.
    """
    if pool not in POOLS:
        raise DeriveError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
    states = RunStates(run, layer=layer, roles=roles, best=best)

    def derive(samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        rows, of_row = [], []
        for i, sample in enumerate(samples):
            for one in _windows(sample, states):
                rows.append(states.row(one, str(len(rows))))
                of_row.append(i)
        found = [torch.cat(list(by_role.values())) for by_role in states.of(rows)]
        return [_told([found[r] for r, owner in enumerate(of_row) if owner == i], pool) for i in range(len(samples))]

    about = f"run {states.checkpoint}, layer {layer}, pool {pool}, roles {','.join(roles) or 'all'}"
    return Deriver(derive, about)


def _windows(sample: Sample, states: RunStates) -> list[Sample]:
    cutting = [reader for reader in states.readers.values() if getattr(reader, "windowed", False)]
    if not cutting:
        return [sample]
    return [sample.at_window(window) for window in range(len(cutting[0].windows(sample)))]


def _told(states: Sequence[Tensor], pool: str) -> Mapping[str, Tensor]:
    lengths = torch.tensor([len(state_nD) for state_nD in states])
    if pool == "mean":
        return {"states": torch.stack([state_nD.mean(0) for state_nD in states]).float(), "lengths": lengths}
    return {"states": torch.cat(list(states)).float(), "lengths": lengths}
