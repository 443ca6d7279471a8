"""What `mmpre data derive` can compute: what a file's `derive(samples)` makes, or states and codes of a run."""
# B rows, N tokens of the packed batch, D model width

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mmpre.batch import Row
from mmpre.codes import NEVER, Centres
from mmpre.data.derive import DeriveError, Deriver
from mmpre.data.index import open_shards
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import CorruptSample, ShardReader
from mmpre.data.units import Units
from mmpre.plugins import file_digest, load_file
from mmpre.runs.states import RunStates

POOLS = ("mean", "none")


def from_file(path: Path) -> Deriver:
    """The function `derive(samples) -> [{name: tensor}, ...]` of a file, which is code that the user trusts."""
    module = load_file(path, "derive")
    if not callable(getattr(module, "derive", None)):
        raise DeriveError(f"{path} must define derive(samples), which returns a mapping of names to tensors for each")
    about = getattr(module.derive, "about", "")  # what a callable object depends on beside its file, such as weights
    return Deriver(module.derive, f"{path.name} {file_digest(path)} {about}".strip())


def from_run(
    run: Path, *, layer: int | None = None, pool: str = "mean", roles: Sequence[str] = (), features: bool = False,
    centres: Path | None = None, best: bool = False,
) -> Deriver:  # fmt: skip
    """The states of a run's network, clean rows in evaluation mode: `states`, and `lengths` of the sample's rows.

    `layer` is counted as `Encoder` counts (0: what comes in), None for the network's result. `pool` mean gives one
    state for each row (a window, or the whole sample), none gives all tokens' states, row after row. With `features`
    it is the modality's clean features (pixels of patches, say) in place of states.
    Of a run whose network is a `Coder`, where neither a layer nor features are asked for, and of any run with `centres`
    (see `fit_centres`), it is `codes`, one for each token, -1 for special ones, and `lengths`.
    """
    if pool not in POOLS:
        raise DeriveError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
    coded = centres is None and layer is None and not features
    states = RunStates(run, layer=layer, roles=roles, features=features, coded=coded, best=best)
    found = None if centres is None else Centres.load(centres)
    if states.coder is not None or found is not None or features:
        _one_role(states)

    def derive(samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        told: list[dict[str, Tensor]] = []
        for rows, by_role in _read(states, samples):
            values = [torch.cat(list(value.values())) for value in by_role]
            if found is None and states.coder is None:
                told.append(_told(values, pool))
                continue
            codes = [value_n if found is None else found.nearest(value_n) for value_n in values]
            codes = [code_n.masked_fill(_special(row, code_n), NEVER) for row, code_n in zip(rows, codes, strict=True)]
            told.append({"codes": torch.cat(codes).int(), "lengths": torch.tensor([len(code_n) for code_n in codes])})
        return told

    what = "features" if features else f"layer {layer}"
    how = f"pool {pool}" if centres is None else f"centres {file_digest(centres)}"
    return Deriver(derive, f"run {states.checkpoint}, {what}, {how}, roles {','.join(roles) or 'all'}")


def fit_centres(
    run: Path, urls: Sequence[str | Path], codes: int, out: Path, *, layer: int | None = None,
    roles: Sequence[str] = (), features: bool = False, best: bool = False,
) -> Centres:  # fmt: skip
    """Fit k-means centres to the states (or features) of all ordinary tokens of some shards, and write them to `out`.

    Fit them to the training shards alone, and use the same ones for the others. Samples that are broken are left out.
    """
    states = RunStates(run, layer=layer, roles=roles, features=features, best=best)
    role, units = _one_role(states), Units(ShardReader(open_shards(urls)))

    def parts() -> Iterator[Tensor]:
        for number in range(len(units)):
            try:
                ((rows, by_role),) = _read(states, [units.sample(number)])
            except (BadMember, CorruptSample):
                continue
            for row, value in zip(rows, by_role, strict=True):
                yield value[role][~_special(row, value[role])]

    found = Centres.fit(parts, codes)
    out.parent.mkdir(parents=True, exist_ok=True)
    found.save(out)
    return found


def _one_role(states: RunStates) -> str:
    if len(states.roles) != 1:
        raise DeriveError(
            f"codes and features are of one role's tokens; choose one of {', '.join(states.roles)} by --roles"
        )
    return states.roles[0]


def _read(states: RunStates, samples: Sequence[Sample]) -> Iterator[tuple[list[Row], list[dict[str, Tensor]]]]:
    """The rows of each sample, and what they give."""
    rows = [[states.row(one, f"{i}") for one in _windows(sample, states)] for i, sample in enumerate(samples)]
    found = iter(states.of([row for of_sample in rows for row in of_sample]))
    for of_sample in rows:
        yield of_sample, [next(found) for _ in of_sample]


def _special(row: Row, value_n: Tensor) -> Tensor:
    (clean,) = row.clean.values()
    return (clean.special_N >= 0).to(value_n.device)


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
