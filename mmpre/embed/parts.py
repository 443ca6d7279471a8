"""Features in parts: who makes which, how a part is made whole, and how all of them become one file.

The rows are cut into parts by their number alone. Each part is made under a lock and gets its name when it is whole, so
that killed work goes on where it was and any number of processes, started together or not, share what is left.
"""
# D model width, n tokens of a role in a row

import fcntl
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from jaxtyping import Float
from torch import Tensor

from mmpre.aside import file_aside
from mmpre.batch import Row
from mmpre.data.index import open_shards
from mmpre.data.sample import BadMember
from mmpre.data.shards import CorruptSample, ShardReader, Sidecar
from mmpre.data.tar import printable
from mmpre.data.units import Units, measure
from mmpre.embed.files import about_of, writer_of
from mmpre.runs.states import RunStates, TowerVectors

log = logging.getLogger(__name__)
POOLS = ("mean", "first", "none", "tower")
PART_BATCHES = {"mean": 64, "first": 64, "none": 4, "tower": 64}  # of all tokens' states there are many


class EmbedError(ValueError):
    """Features that cannot be made as asked."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked for, and by what work; all of it but `max_holes` may change bits of the result."""

    run: str
    data: tuple[str, ...]
    sidecar: str | None = None
    layer: int | None = None
    pool: str = "mean"
    roles: tuple[str, ...] = ()
    best: bool = False
    batch: int = 32
    threads: int = 1
    max_holes: float = 0.05

    def __post_init__(self) -> None:
        problems = []
        if self.pool not in POOLS:
            problems.append(f"pool must be one of {', '.join(POOLS)}, got {self.pool!r}")
        problems += [f"{n} must be at least 1, got {getattr(self, n)}" for n in ("batch", "threads")
                     if getattr(self, n) < 1]  # fmt: skip
        if self.pool == "tower" and self.layer is not None:
            problems.append(f"towers end in one vector and have no layer to choose, got layer {self.layer}")
        if not 0 <= self.max_holes <= 1:
            problems.append(f"max_holes is a share, 0 to 1; got {self.max_holes}")
        if not self.data:
            problems.append("no shards were given; name some with --data")
        if problems:
            raise EmbedError("embed: " + "; ".join(problems))


class Work:
    """One process's share of the work."""

    def __init__(self, asked: Asked, out: Path, rank: int = 0) -> None:
        device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
        self.asked, self.out = asked, out
        about = dict(roles=asked.roles, best=asked.best, device=device)
        tower = asked.pool == "tower"
        self.states = TowerVectors(asked.run, **about) if tower else RunStates(asked.run, layer=asked.layer, **about)
        shards = open_shards(asked.data)
        sidecars = [Sidecar(Path(asked.sidecar), shards)] if asked.sidecar else []
        readers = list(self.states.readers.values())
        self.units = measure(Units(ShardReader(shards), sidecars), readers, shards.cache)
        self.rows = asked.batch * PART_BATCHES[asked.pool]
        self.parts = -(-len(self.units) // self.rows)
        self.about = {
            **{name: value for name, value in asdict(asked).items()
               if name not in ("run", "data", "sidecar", "best", "max_holes")},
            "roles": list(self.states.roles), "checkpoint": self.states.checkpoint,
            "sidecar": [one.reader.shards.fingerprint for one in sidecars],
            "data": shards.fingerprint, "rows": len(self.units), "torch": torch.__version__,
        }  # fmt: skip
        self.folder = out.parent / f".{out.name}.parts"
        self.lock_file: Any = None
        if not self.finished():
            self._begin()

    def finished(self) -> bool:
        """Whether the file is there, made as asked. Raises EmbedError where it was made otherwise."""
        if not self.out.exists():
            return False
        try:
            was = about_of(self.out)
        except Exception as e:
            raise EmbedError(
                f"embed: {self.out} is there and was not made by embed ({e}); give another --out"
            ) from None
        if differs := _differs(was["asked"], self.about):
            raise EmbedError(
                f"embed: {self.out} is there, made otherwise ({differs}); remove it, or give another --out"
            )
        return True

    def told(self) -> dict[str, Any]:
        about = about_of(self.out)
        return {"out": str(self.out), "rows": about["written"], "of": len(self.units), "holes": about["holes"],
                "named_in": about["named_in"]}  # fmt: skip

    def run(self) -> dict[str, Any]:
        later = [part for part in range(self.parts) if not self._make(part, wait=False)]
        for part in later:  # others had them; where one of those was killed, its part is made here
            self._make(part, wait=True)
        with self._lock(self.parts, wait=True):
            if not self.finished():
                self._put_together()
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.told()

    def close(self) -> None:
        if self.lock_file is not None:
            self.lock_file.close()

    def _begin(self) -> None:
        """The folder of the parts, which are all made alike."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock_file = (self.folder / "lock").open("w")
        path = self.folder / "asked.json"
        with self._lock(self.parts, wait=True):
            if not path.exists():
                with file_aside(path) as aside:
                    aside.write_text(json.dumps(self.about))
        if differs := _differs(json.loads(path.read_text()), self.about):
            raise EmbedError(
                f"embed: {self.folder} holds parts that were made otherwise ({differs}); go on as they were made, or "
                "remove it to begin anew"
            )

    def _make(self, part: int, *, wait: bool) -> bool:
        """Have a part made; False where another process is at it."""
        path = self._path(part)
        with self._lock(part, wait=wait) as mine:
            if mine and not path.exists():
                for left in self.folder.glob(f".{path.name}.aside-*"):  # of a process that was killed
                    left.unlink(missing_ok=True)
                self._write(part, path)
            return mine

    def _write(self, part: int, path: Path) -> None:
        first, last = part * self.rows, min((part + 1) * self.rows, len(self.units))
        found: list[dict[str, Tensor]] = []
        names: list[tuple[str, str, int]] = []  # key, shard, window
        holes: list[dict[str, str]] = []
        for start in range(first, last, self.asked.batch):
            rows, units = self._rows(range(start, min(start + self.asked.batch, last)), holes)
            for row, unit, by_role in zip(rows, units, self.states.of(rows) if rows else (), strict=True):
                shard, key = self.units.identity(unit)
                found.append({role: _pooled(x, row, role, self.asked.pool) for role, x in by_role.items()})
                names.append((key, shard, self.units.place(unit)[1]))
        self._check_holes(len(holes), holes)
        tensors = {}
        for role in self.states.roles if found else ():
            states = [one[role] for one in found]
            if self.asked.pool == "none":
                tensors[f"lengths.{role}"] = torch.tensor([len(state_nD) for state_nD in states], dtype=torch.int32)
                tensors[f"states.{role}"] = torch.cat(states)
            else:
                tensors[f"states.{role}"] = torch.stack(states)
        told = {"names": json.dumps(names), "holes": json.dumps(holes)}
        with file_aside(path) as aside:
            safetensors.torch.save_file(tensors, aside, told)
        log.info("embed: part %d of %d", part + 1, self.parts)

    def _rows(self, units: Sequence[int], holes: list[dict[str, str]]) -> tuple[list[Row], list[int]]:
        """The rows of some units, and which units these are; the others are named in `holes`."""
        rows, good = [], []
        for unit in units:
            shard, key = self.units.identity(unit)
            try:
                row = self.states.row(self.units.sample(unit), str(unit))
                _check_poolable(row, self.asked.pool)
            except (CorruptSample, BadMember) as e:
                holes.append({"shard": shard, "key": key, "cause": e.cause, "detail": e.detail})
                log.warning("%s: %s is left out: %s", printable(shard), printable(key), e.cause)
                continue
            rows.append(row)
            good.append(unit)
        return rows, good

    def _put_together(self) -> None:
        """One file of all parts, read one after the other; the holes' names beside it come first."""
        holes: Counter[str] = Counter()
        names = self.out.with_name(f"{self.out.name}.holes.jsonl")
        names.unlink(missing_ok=True)
        written = 0
        with file_aside(names) as aside, aside.open("w") as file:
            for part in range(self.parts):
                rows, left_out = _named(self._path(part))
                written += len(rows)
                for hole in left_out:
                    holes[hole["cause"]] += 1
                    file.write(json.dumps(hole) + "\n")
        self._check_holes(holes.total(), [])
        if not written:
            raise EmbedError(f"embed: none of the {len(self.units)} rows can be read; {names} says why")
        if not holes:
            names.unlink()
        about = {"asked": self.about, "written": written, "holes": dict(holes),
                 "named_in": names.name if holes else None}  # fmt: skip
        with file_aside(self.out) as aside:
            writer_of(self.out)(aside, [self._path(part) for part in range(self.parts)], about)

    def _check_holes(self, count: int, holes: Sequence[Mapping[str, str]]) -> None:
        if count > self.asked.max_holes * len(self.units):
            some = "; ".join(f"{one['shard']}: {one['key']}: {one['cause']}" for one in holes[:3])
            raise EmbedError(
                f"embed: {count} of {len(self.units)} rows cannot be read{f' ({some})' if some else ''}, at most "
                f"{self.asked.max_holes:.1%} may; mend the shards, or allow more with --max-holes"
            )

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:08d}.safetensors"

    @contextmanager
    def _lock(self, number: int, *, wait: bool) -> Iterator[bool]:
        """Hold one byte of the lock file, which a process that dies lets go."""
        try:
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, number)
        except (BlockingIOError, PermissionError):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self.lock_file, fcntl.LOCK_UN, 1, number)


def _check_poolable(row: Row, pool: str) -> None:
    for role, tokens in row.seen.items():
        if pool != "none" and not (len(tokens) if pool == "first" else (tokens.special_N < 0).any()):
            raise BadMember("nothing to pool", role, f"role {role!r} has no token to take the {pool} of")


def _pooled(state_nD: Float[Tensor, "n D"], row: Row, role: str, pool: str) -> Float[Tensor, "..."]:
    if pool == "first":
        state_nD = state_nD[0]
    elif pool == "mean":
        state_nD = state_nD[(row.seen[role].special_N < 0).to(state_nD.device)].mean(0)
    return state_nD.float().cpu()


def _named(path: Path) -> tuple[list, list]:
    with safetensors.safe_open(path, "pt") as part:
        told = part.metadata()
    return json.loads(told["names"]), json.loads(told["holes"])


def _differs(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    def short(value: Any) -> str:
        return repr(value[:12] if isinstance(value, str) else value)  # of digests

    told = [
        f"{name}: {short(was.get(name))} there, {short(now[name])} here" for name in now if was.get(name) != now[name]
    ]
    return "; ".join(told)
