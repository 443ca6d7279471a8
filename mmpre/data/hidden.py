"""What a mask hides of the samples of some shards, as a picture: `mmpre data inspect --modality NAME`."""

import ast
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image

from mmpre.aside import file_aside
from mmpre.data.contract import check_tokens
from mmpre.data.index import open_shards
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import CorruptSample, ShardReader, Sidecar
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.masking.exact import ExactShare
from mmpre.masking.grid import Blocks, Tube
from mmpre.masking.protocol import Mask
from mmpre.masking.random import RandomTokens
from mmpre.masking.spans import GeometricSpans, StartedSpans
from mmpre.masking.units import WholeUnits
from mmpre.modality import Reader
from mmpre.show import WIDTH_PX, show_row, stacked

KINDS = {
    one.__name__: one for one in (RandomTokens, ExactShare, StartedSpans, GeometricSpans, WholeUnits, Blocks, Tube)
}
USUAL = "RandomTokens(rate=0.15)"
TRIED = 10  # times as many samples as are to be shown, before giving up


def parse_mask(text: str, role: str) -> Mask:
    """A mask as recipes write it, without its role: `StartedSpans(chance=0.1, length=10)`. Nothing is run.

    Raises ValueError for what is no such text, an unknown name, or numbers that the mask refuses.
    """
    try:
        return _made(ast.parse(text.strip(), mode="eval").body, role)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as e:
        raise ValueError(
            f"mask: wanted one of {', '.join(KINDS)} with its numbers, such as {USUAL}, got {text!r} ({e})"
        ) from None


def _made(node: ast.expr, role: str) -> Any:
    if not isinstance(node, ast.Call):
        try:
            return ast.literal_eval(node)
        except ValueError:
            raise TypeError("its numbers must be plain ones, or masks") from None
    if not isinstance(node.func, ast.Name) or node.args or any(keyword.arg is None for keyword in node.keywords):
        raise TypeError("a mask is Name(number=value, ...)")
    if node.func.id not in KINDS:
        near = difflib.get_close_matches(node.func.id, KINDS, 1)
        raise TypeError(f"there is no mask {node.func.id}" + (f"; did you mean {near[0]}?" if near else ""))
    return KINDS[node.func.id](role=role, **{keyword.arg: _made(keyword.value, role) for keyword in node.keywords})


def draw_hidden(
    urls: Sequence[str],
    modality: ModuleType,
    out: Path,
    *,
    mask: str = USUAL,
    samples: int = 3,
    sidecar: Path | None = None,
) -> dict[str, Any]:
    """Write a PNG of the first samples that can be read, what the mask hides marked; says how much was hidden.

    The modality's module says how it is read ordinarily: `plain_reader(sample) -> Reader`. `sidecar` is a folder of
    derived members. A picture narrower than half of the sheet stands beside itself with nothing hidden.
    Raises ValueError where no sample can be read.
    """
    path = Path(modality.__file__)
    name = path.parent.name if path.stem == "__init__" else path.stem
    plain: Callable[[Sample], Reader] | None = getattr(modality, "plain_reader", None)
    if plain is None:
        raise ValueError(
            f"inspect: {name} does not say how it is read; its file needs plain_reader(sample), which returns a reader"
        )
    chosen, shards = parse_mask(mask, name), open_shards(urls)
    units = Units(ShardReader(shards), [Sidecar(sidecar, shards)] if sidecar else [])
    shown, told, last = [], [], "there are none"
    for i in range(min(len(units), samples * TRIED)):
        try:
            sample = units.sample(i)
            adapter = plain(sample)
            draw = Draw.row(0, 0, 0, epoch=0, unit=i)
            tokens = adapter.tokenize(sample, draw.child("tokenize"))
            check_tokens(tokens, name, adapter, sample)
        except (BadMember, CorruptSample) as e:
            last = f"{units.identity(i)[1]}: {e}"
            continue
        hidden_N = torch.zeros(len(tokens), dtype=torch.bool)
        hidden_N[chosen(tokens, draw.child("pick"))] = True
        picture = show_row(adapter, tokens, hidden_N, sample)
        if picture.width <= WIDTH_PX // 2 - 4:
            picture = _beside(show_row(adapter, tokens, torch.zeros_like(hidden_N), sample), picture)
        ordinary = int((tokens.special_N < 0).sum())
        told.append({"key": sample.key, "tokens": len(tokens), "ordinary": ordinary, "hidden": int(hidden_N.sum())})
        shown.append((f"{sample.key}: {told[-1]['hidden']} of {ordinary} tokens hidden by {mask}", picture))
        if len(shown) == samples:
            break
    if not shown:
        raise ValueError(f"inspect: no sample of {', '.join(map(str, urls))} can be read as {name}; the last: {last}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with file_aside(out) as aside:
        stacked(shown).save(aside, format="PNG")
    return {"picture": str(out), "mask": mask, "shown": told}


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (left.width + right.width + 8, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 8, 0))
    return both
