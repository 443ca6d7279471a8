"""What `mmpre data derive` can compute: what a file's `derive(samples)` makes, or the states of a run's network."""
# B rows, N tokens of the packed batch, D model width

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mmpre.data.derive import DeriveError, Deriver
from mmpre.data.sample import Sample
from mmpre.draw import Draw
from mmpre.network import Network
from mmpre.plugins import load_file
from mmpre.processes import Processes
from mmpre.run import load
from mmpre.tokens import Row, pack
from mmpre.view import View

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
    opened = load(run, best=best)
    network = opened.recipe.network
    if not isinstance(network, Network):
        raise DeriveError(f"{run}: its recipe's network is a {type(network).__name__}; states are read from a Network")
    depth = len(network.encoder.blocks)
    if layer is not None and not 0 <= layer <= depth:
        raise DeriveError(f"layer must lie between 0 (what comes in) and {depth}, got {layer}")
    if unknown := set(roles) - set(network.readers):
        raise DeriveError(f"no role {', '.join(sorted(unknown))}; the network has {', '.join(network.readers)}")
    device = Processes.device_here()
    network.to(device).eval()
    view = View(roles=tuple(roles) or None)

    def derive(samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        rows, of_row = [], []
        for i, sample in enumerate(samples):
            for one in _windows(sample, network):
                rows.append(replace(_row(view, one, network), key=str(len(rows))))
                of_row.append(i)
        batch = pack(rows, view.attend.plan).to(device)
        with torch.inference_mode():
            if layer is None:
                state_ND = network(batch)
            else:
                state_ND = network(batch, read=[layer]).layer[layer]
        found: dict[int, Tensor] = {}
        for key, state_nD in zip(batch.keys, state_ND.split(batch.layout.lengths_B.tolist()), strict=True):
            found[int(key)] = state_nD
        return [_told([found[r] for r, owner in enumerate(of_row) if owner == i], pool) for i in range(len(samples))]

    manifest = hashlib.sha256((opened.checkpoint.path / "MANIFEST.json").read_bytes()).hexdigest()
    about = f"run {manifest}, layer {layer}, pool {pool}, roles {','.join(roles) or 'all'}"
    return Deriver(derive, about)


def _windows(sample: Sample, network: Network) -> list[Sample]:
    cutting = [reader for reader in network.readers.values() if getattr(reader, "windowed", False)]
    if not cutting:
        return [sample]
    return [sample.at_window(window) for window in range(len(cutting[0].windows(sample)))]


def _row(view: View, sample: Sample, network: Network) -> Row:
    draw = Draw.row(0, 0, 0, epoch=0, unit=0)
    return view.row(sample, network.readers, draw, lambda role, k: sample)


def _told(states: Sequence[Tensor], pool: str) -> Mapping[str, Tensor]:
    lengths = torch.tensor([len(state_nD) for state_nD in states])
    if pool == "mean":
        return {"states": torch.stack([state_nD.mean(0) for state_nD in states]).float(), "lengths": lengths}
    return {"states": torch.cat(list(states)).float(), "lengths": lengths}
