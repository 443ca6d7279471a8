"""What a frozen network makes of samples, computed once into a sidecar: `mmpre data derive`.

A sidecar is a folder with a tar for each shard, of the same name, keys and order, and `sidecar.json`, which says by
digest which shards they were made of (`mmpre.data.shards.Sidecar` joins them). Each shard is made aside under a lock
and gets its name when it is whole: killed work goes on at the shard it was at, and several processes share the shards.
"""

import fcntl
import json
import logging
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
from torch import Tensor

from mmpre.aside import file_aside
from mmpre.data.index import ShardIndex, Shards, open_shards
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import CorruptSample, ShardReader, record_sidecar, shard_writer
from mmpre.data.tar import printable

log = logging.getLogger(__name__)
SUFFIX = "derived.safetensors"
_MADE = ".made"  # in the sidecar's folder: what is known of each shard that is whole, and the locks
_MANY = 1 << 60


class DeriveError(ValueError):
    """Something that cannot be derived as asked."""


@dataclass(frozen=True)
class Deriver:
    """Makes named tensors of samples, one mapping for each. It raises BadMember for a sample that it cannot use.

    `about` tells what it is; it changes with everything that the tensors depend on.
    """

    function: Callable[[Sequence[Sample]], Sequence[Mapping[str, Tensor]]]
    about: str


def derive(
    urls: Sequence[str | Path], out: Path | str, deriver: Deriver, *, suffix: str = SUFFIX, batch: int = 32,
    max_holes: float = 0.05,
) -> str:  # fmt: skip
    """Write the sidecar of some shards; returns what was done, in a line.

    A sample that is broken or that the deriver cannot use is a hole, named in `sidecar.json`. Shards that are there
    already are kept. Raises DeriveError where a shard has more holes than the share `max_holes`, or `out` holds what
    was made otherwise.
    """
    if batch < 1 or not 0 <= max_holes <= 1:
        raise DeriveError(f"derive: batch must be at least 1, max_holes a share; got {batch} and {max_holes}")
    shards, out = open_shards(urls), Path(out)
    for index in shards.indexes:
        if out.resolve() == index.path.parent.resolve():
            raise DeriveError(f"derive: {out} holds the shards themselves; give the sidecar a folder of its own")
    (out / _MADE).mkdir(parents=True, exist_ok=True)
    work = _Work(shards, out, deriver, suffix, batch, max_holes)
    later = [index for index in shards.indexes if not work.make(index, wait=False)]
    for index in later:  # other processes had them; where one of them was killed, its shard is made here
        work.make(index, wait=True)
    holes = {index.path.name: work.known(index)["holes"] for index in shards.indexes}
    record_sidecar(out, shards, holes={name: keys for name, keys in holes.items() if keys})
    lost = sum(map(len, holes.values()))
    told = f" ({', '.join(f'{cause}: {n}' for cause, n in work.causes.items())})" if work.causes else ""
    return (
        f"{out}: {len(shards) - lost:,} of {len(shards):,} samples in {len(shards.indexes)} shards, "
        f"{work.made} of them made now, {lost} holes{told}"
    )


class _Work:
    def __init__(self, shards: Shards, out: Path, deriver: Deriver, suffix: str, batch: int, max_holes: float) -> None:
        self.shards, self.out, self.deriver, self.suffix = shards, out, deriver, suffix
        self.batch, self.max_holes = batch, max_holes
        self.reader = ShardReader(shards)
        self.causes: Counter[str] = Counter()
        self.made = 0

    def make(self, index: ShardIndex, *, wait: bool) -> bool:
        """Have a shard made; False where another process is at it."""
        with self._lock(index, wait) as mine:
            if mine and self.known(index) is None:
                self._write(index)
            return mine

    def known(self, index: ShardIndex) -> dict | None:
        """What was written down of a shard's sidecar, None where it is not whole."""
        path = self.out / index.path.name
        try:
            told = json.loads(self._note(index).read_bytes())
            asked = {"made_of": index.digest, "by": self.deriver.about, "suffix": self.suffix}
            differs = [name for name, value in asked.items() if told[name] != value]
            if not path.exists():
                return None
        except FileNotFoundError:
            if path.exists():
                raise DeriveError(f"derive: {path} exists, made by something else; give another folder") from None
            return None
        except (ValueError, KeyError, TypeError):
            raise DeriveError(f"derive: {self._note(index)} cannot be read; remove {path} and it") from None
        if differs:
            was = ", ".join(str(told[name]) for name in differs)
            raise DeriveError(
                f"derive: {path} is of another {', '.join(differs)} ({was}); give another folder, or remove this one"
            )
        return told

    def _write(self, index: ShardIndex) -> None:
        path = self.out / index.path.name
        for left in self.out.glob(f".tmp-{index.path.name}-*"):  # of a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        aside = self.out / f".tmp-{index.path.name}-{uuid.uuid4().hex[:8]}"
        holes: list[str] = []
        try:
            with shard_writer(aside, maxcount=_MANY, maxsize=_MANY) as sink:
                for start in range(0, len(index), self.batch):
                    keys = range(start, min(start + self.batch, len(index)))
                    for key, tensors in self._tensors(index, keys, holes):
                        sink.write({"__key__": key, self.suffix: safetensors.torch.save(tensors)})
            if len(holes) > self.max_holes * len(index) or not sink.paths:
                causes = ", ".join(f"{cause}: {n}" for cause, n in self.causes.items())
                raise DeriveError(
                    f"derive: {len(holes)} of {len(index)} samples of {index.path} cannot be used ({causes}), at most "
                    f"{self.max_holes:.1%} may; mend the shard, or allow more with max_holes"
                )
            note = {"made_of": index.digest, "by": self.deriver.about, "suffix": self.suffix, "holes": holes}
            _put(self._note(index), note)  # first: a note without its shard is made again, a shard without is not ours
            os.replace(sink.paths[0], path)
            self.made += 1
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _tensors(
        self, index: ShardIndex, numbers: Sequence[int], holes: list[str]
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        samples = []
        for number in numbers:
            try:
                members = self.reader.read_local(index, number)
                samples.append(Sample(index.key(number), index.path.name, index.digest, members))
            except CorruptSample as e:
                self._hole(index, index.key(number), e.cause, holes)
        try:
            groups = [(samples, self._call(samples))] if samples else []
        except BadMember:  # one of them is at fault: ask for each by itself
            groups = []
            for sample in samples:
                try:
                    groups.append(([sample], self._call([sample])))
                except BadMember as e:
                    self._hole(index, sample.key, f"{e.member}: {e.cause}", holes)
        for group, made in groups:
            for sample, tensors in zip(group, made, strict=True):
                yield sample.key, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def _call(self, samples: Sequence[Sample]) -> Sequence[Mapping[str, Tensor]]:
        made = list(self.deriver.function(samples))
        good = all(isinstance(one, Mapping) and one and all(map(_is_tensor, one.values())) for one in made)
        if len(made) != len(samples) or not good:
            raise DeriveError(
                f"derive({len(samples)} samples) must return that many mappings of names to tensors, it returned "
                f"{len(made)} of {', '.join(sorted({type(one).__name__ for one in made})) or 'nothing'}"
            )
        return made

    def _hole(self, index: ShardIndex, key: str, cause: str, holes: list[str]) -> None:
        self.causes[cause] += 1
        holes.append(key)
        log.warning("%s: %s is left out: %s", index.path.name, printable(key), cause)

    def _note(self, index: ShardIndex) -> Path:
        return self.out / _MADE / f"{index.path.name}.json"

    @contextmanager
    def _lock(self, index: ShardIndex, wait: bool) -> Iterator[bool]:
        with (self.out / _MADE / f"{index.path.name}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


def _put(path: Path, told: Mapping[str, object]) -> None:
    with file_aside(path) as aside:
        aside.write_text(json.dumps(told) + "\n")
