"""The states of a run's network, read from clean rows in evaluation mode: what embed and derive make features of."""
# N tokens of the packed batch, B rows, n tokens of a role in a row, D model width, or that of the shared space

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from mmpre.batch import Batch, Row, pack
from mmpre.codes import Coder
from mmpre.data.sample import Sample
from mmpre.draw import Draw
from mmpre.modality import Reader, still
from mmpre.network import Network
from mmpre.processes.processes import Processes
from mmpre.runs.run import Run, load
from mmpre.view import View


class StatesError(ValueError):
    """States that a run cannot give."""


class RunStates:
    """A run's network and its readers, those that augment without their chance (`Reader.still`).

    `layer` is counted as `Encoder` counts (0: what comes in), None for the network's result. `roles` are those that
    rows have, by default all. With `features` the modalities' clean features are given in place of states. Of a run
    whose network is a `Coder` it is the states that are coded, or, with `coded`, the codes.
    """

    def __init__(
        self, run: Path | str, *, layer: int | None = None, roles: Sequence[str] = (), best: bool = False,
        features: bool = False, coded: bool = False, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        opened = load(run, best=best)
        network = opened.recipe.network
        coder = network if isinstance(network, Coder) else None
        network = network if coder is None else coder.net
        if not isinstance(network, Network):
            raise StatesError(
                f"{run}: its recipe's network is a {type(network).__name__}; states are read from a Network"
            )
        depth = len(network.encoder.blocks)
        if layer is not None and not 0 <= layer <= depth:
            raise StatesError(f"layer must lie between 0 (what comes in) and {depth}, got {layer}")
        if unknown := set(roles) - set(network.readers):
            raise StatesError(f"no role {', '.join(sorted(unknown))}; the network has {', '.join(network.readers)}")
        self.device = Processes.device_here() if device is None else torch.device(device)
        self.network, self.layer, self.features = network.to(self.device).eval(), layer, features
        self.coder = None if coder is None or not coded else coder.to(self.device).eval()
        self.roles = tuple(role for role in network.readers if not roles or role in roles)
        self.view = View(roles=self.roles, attend=network.attend)
        self.readers: Mapping[str, Reader] = {role: still(one) for role, one in network.readers.items()}
        self.checkpoint = _digest(opened)

    def row(self, sample: Sample, key: str) -> Row:
        """A sample's row. Raises BadMember where it cannot be read."""
        made = self.view.row(sample, self.readers, Draw.row(0, 0, 0, epoch=0, unit=0), lambda role, k: sample)
        return replace(made, key=key)

    def of(self, rows: Sequence[Row]) -> list[dict[str, Shaped[Tensor, "n ..."]]]:
        """For each row, its states (features, codes) by role, in the order of the rows."""
        batch = pack(rows, self.view.attend.plan).to(self.device)
        found: list[dict[str, Tensor]] = [{} for _ in rows]
        with torch.inference_mode():
            for role, value_N in self._values(batch):
                lengths = batch.layout.lengths[role].tolist()
                for number, value_n in zip(batch.order_B.tolist(), value_N.split(lengths), strict=True):
                    found[number][role] = value_n
        return found

    def _values(self, batch: Batch) -> Iterator[tuple[str, Shaped[Tensor, "n ..."]]]:
        if self.features:
            for role in batch.layout.roles:
                yield role, self.network.modalities[role].features(batch.clean[role])
            return
        if self.coder is not None:
            value_N = self.coder.codes(batch)
        elif self.layer is None:
            value_N = self.network(batch)
        else:
            value_N = self.network(batch, read=[self.layer]).layer[self.layer]
        for role in batch.layout.roles:
            yield role, value_N.index_select(0, batch.layout.index[role])


class TowerVectors:
    """A run's towers (`Recipe.towers`): of each row a vector of length 1 by role, in the space that they share."""

    def __init__(
        self, run: Path | str, *, roles: Sequence[str] = (), best: bool = False,
        device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        opened = load(run, best=best)
        towers = opened.recipe.towers
        if not towers:
            raise StatesError(f"{run}: its recipe names no towers; take the mean of states, or the first one")
        if unknown := set(roles) - set(towers):
            raise StatesError(f"no tower {', '.join(sorted(unknown))}; the recipe has {', '.join(towers)}")
        device = Processes.device_here() if device is None else torch.device(device)
        self.device, self.roles = device, tuple(role for role in towers if not roles or role in roles)
        self.towers = {role: towers[role].to(device).eval() for role in self.roles}
        self.readers: Mapping[str, Reader] = {role: still(one.net.readers[role]) for role, one in self.towers.items()}
        self.view, self.checkpoint = View(), _digest(opened)

    def row(self, sample: Sample, key: str) -> Row:
        """A sample's row. Raises BadMember where it cannot be read."""
        made = self.view.row(sample, self.readers, Draw.row(0, 0, 0, epoch=0, unit=0), lambda role, k: sample)
        return replace(made, key=key)

    def of(self, rows: Sequence[Row]) -> list[dict[str, Float[Tensor, "D"]]]:
        """For each row, its vectors by role, in the order of the rows."""
        found: list[dict[str, Tensor]] = [{} for _ in rows]
        with torch.inference_mode():
            for role, tower in self.towers.items():
                batch = pack([_alone(row, role) for row in rows], tower.net.attend.plan).to(self.device)
                vector_BD = F.normalize(tower(batch).float(), dim=1)
                for number, vector_D in zip(batch.order_B.tolist(), vector_BD, strict=True):
                    found[number][role] = vector_D
        return found


def _alone(row: Row, role: str) -> Row:
    """A row's tokens of one role."""
    clean, seen, replaced = ({role: part[role]} for part in (row.clean, row.seen, row.replaced))
    return replace(row, clean=clean, seen=seen, replaced=replaced)


def _digest(opened: Run) -> str:
    return hashlib.sha256((opened.checkpoint.path / "MANIFEST.json").read_bytes()).hexdigest()
