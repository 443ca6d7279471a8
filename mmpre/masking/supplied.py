"""Masks that a file supplies, sample by sample."""
# N tokens, M picked tokens

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from jaxtyping import Int
from torch import Tensor

from mmpre.data.sample import Sample
from mmpre.draw import Draw
from mmpre.masking.protocol import Mask
from mmpre.strict_json import JSONError, parse
from mmpre.tokens import Tokens

Name = tuple[str, int]  # a sample's key and the number of its window


class SuppliedError(ValueError):
    """A file of masks that cannot be used, or that does not fit the tokens."""


@dataclass(frozen=True, kw_only=True)
class Supplied:
    """Pick what a file says for a sample's key and window. Works on one row.

    `otherwise` picks where the file names no token of a sample; without it, a sample that is missing in the file stops
    the run, and one with an empty list has nothing picked. Make it with `from_file`.
    Vega v2's self-evolution (Zhong et al. 2022, arXiv:2212.01853) hides tokens that an earlier model found hard, and
    random ones where there are none.
    """

    role: str
    picks: Mapping[Name, Int[Tensor, "M"]]
    source: str
    otherwise: Mask | None = None

    @staticmethod
    def from_file(path: Path | str, *, role: str, otherwise: Mask | None = None) -> "Supplied":
        """Read .jsonl, lines such as {"key": "a/b", "window": 0, "index": [3, 4]} (the window may be left out), or
        .safetensors, whose tensors are named KEY or KEY#WINDOW. An index counts the row's tokens, special ones too.
        """
        path = Path(path)
        readers = {".jsonl": _from_lines, ".safetensors": _from_tensors}
        if path.suffix not in readers:
            raise SuppliedError(f"Supplied: wanted a .jsonl or .safetensors file, got {path}")
        try:
            picks = readers[path.suffix](path)
        except OSError as e:
            raise SuppliedError(f"Supplied: {path} cannot be read ({e})") from None
        return Supplied(role=role, picks=picks, source=str(path), otherwise=otherwise)

    def of(self, sample: Sample) -> Mask:
        index_M = self.picks.get((sample.key, sample.window))
        if self.otherwise is not None and (index_M is None or not len(index_M)):
            return self.otherwise
        if index_M is None:
            raise SuppliedError(
                f"Supplied: {self.source} has no mask for window {sample.window} of sample {sample.key!r}; make one "
                "for every sample, or give `otherwise` a mask for the rest"
            )
        return _Of(self.role, index_M, f"{self.source}, window {sample.window} of sample {sample.key!r}")


@dataclass(frozen=True)
class _Of:
    role: str
    index_M: Int[Tensor, "M"]
    source: str

    def __call__(self, tokens: Tokens, draw: Draw) -> Int[Tensor, "M"]:
        index_M = self.index_M.unique()
        if len(index_M) and not 0 <= int(index_M[0]) <= int(index_M[-1]) < len(tokens):
            raise SuppliedError(
                f"Supplied: {self.source}: wanted tokens 0 to {len(tokens) - 1}, got {index_M.tolist()[:20]}; it was "
                "made with another reader"
            )
        if len(special_M := index_M[tokens.special_N[index_M] >= 0]):
            raise SuppliedError(f"Supplied: {self.source}: tokens {special_M.tolist()} are special and never picked")
        return index_M


def _from_lines(path: Path) -> dict[Name, Tensor]:
    picks: dict[Name, Tensor] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"Supplied: {path}, line {number}"
        try:
            one = parse(line) if line.strip() else None
        except JSONError as e:
            raise SuppliedError(f"{where}: {e}") from None
        if one is None:
            continue
        if not isinstance(one, dict) or not _fits(one.get("key"), one.get("window", 0), one.get("index")):
            raise SuppliedError(f'{where}: wanted {{"key": "a", "window": 0, "index": [3, 4]}}, got {line[:80]!r}')
        name = (one["key"], one.get("window", 0))
        if name in picks:
            raise SuppliedError(f"{where}: window {name[1]} of {name[0]!r} is there twice")
        picks[name] = torch.tensor(one["index"], dtype=torch.int64)
    return picks


def _fits(key: object, window: object, index: object) -> bool:
    numbers = [window, *index] if isinstance(index, list) else [None]
    return isinstance(key, str) and all(type(n) is int and 0 <= n < 1 << 31 for n in numbers)


def _from_tensors(path: Path) -> dict[Name, Tensor]:
    path.stat()
    try:
        tensors = safetensors.torch.load_file(path)
    except Exception as e:  # the library's own error class is not public
        raise SuppliedError(f"Supplied: {path} is no safetensors file ({str(e)[:200]})") from None
    picks: dict[Name, Tensor] = {}
    for name, index_M in tensors.items():
        if index_M.ndim != 1 or index_M.is_floating_point() or index_M.dtype == torch.bool:
            raise SuppliedError(
                f"Supplied: {path}: tensor {name!r} must be a list of whole numbers, got {index_M.dtype} of shape "
                f"{list(index_M.shape)}"
            )
        key, mark, window = name.rpartition("#")
        picks[(key, int(window)) if mark and window.isdecimal() else (name, 0)] = index_M.long()
    return picks
