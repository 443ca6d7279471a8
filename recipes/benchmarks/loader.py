"""mmpre's loader against a bare WebDataset pipeline that decodes the same, with two workers each.

    mmpre        checks every member's CRC-32, keeps an exact order, hides tokens and packs the rows
    webdataset   WebDataset, a shuffle buffer, the same tokenizer or the same crops and patches, batches; no checks

Texts are cut into word pieces, pictures decoded, cropped, and cut into patches. Batches arrive in the training process.
The crops of both are torchvision's; it resizes them by Pillow, and mmpre by torch, of which few values differ, by up to
3 of 255.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from mmpre.benchmark import Comparison, Settings, Turn
from mmpre.data.index import open_shards
from mmpre.data.loader import MicroBatches, load, slots
from mmpre.data.shards import ShardReader, shard_writer
from mmpre.data.units import Units, measure
from mmpre.recipe import Stage
from mmpre.recipes.benchmarks.harness import serve, take_turns, timed
from mmpre.recipes.benchmarks.pictures import write_pictures
from mmpre.recipes.benchmarks.texts import tokenizer_of
from mmpre.recipes.bert import bert
from mmpre.recipes.mae import mae

description = "mmpre's loader against a bare WebDataset pipeline, texts and pictures"

WORKERS = 2
LENGTH, SIDE_PX, PATCH_PX = 256, 224, 16
SHARDS = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """`batch` rows make a step; `tokenizer` is empty for pictures."""

    data: str
    tokenizer: str = ""
    batch: int
    steps: int
    warmup: int = 10


def run(settings: Settings) -> Iterator[Comparison]:
    for kind, write in {"texts": _texts, "pictures": _pictures}.items():
        if settings.cases not in kind:
            continue
        with TemporaryDirectory(prefix="mmpre-bench-") as folder:
            case = write(Path(folder), settings.steps)
            turns = take_turns(__spec__.name, list(CONTENDERS), asdict(case), settings, kind)
            about = {"batch": case.batch, "steps": case.steps, "workers": WORKERS}
            yield Comparison(title=f"{kind}, {WORKERS} workers", unit="rows", turns=turns, about=about)


def _texts(folder: Path, steps: int | None) -> Case:
    steps = steps or 300
    data = write_texts(folder / "texts", min(40_000, 64 * (steps + 20)))
    return Case(data=str(data / "train"), tokenizer=str(tokenizer_of(data, 8_000, folder)), batch=64, steps=steps)


def _pictures(folder: Path, steps: int | None) -> Case:
    return Case(data=str(write_pictures(folder, 512, side_px=(250, 500))), batch=16, steps=steps or 60, warmup=6)


def write_texts(folder: Path, count: int, seed: int = 0) -> Path:
    """A data set of texts of 10 to 150 words, drawn from 5,000 made-up ones as often as words are in a language."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlucmfwypvbgkqjxz"))
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, 5_000)]
    with shard_writer(folder / "train", maxcount=-(-count // SHARDS)) as sink:
        for i in range(count):
            chosen = rng.zipf(1.2, rng.integers(10, 150)) % len(words)
            sink.write({"__key__": f"text{i:06d}", "txt": " ".join(words[word] for word in chosen)})
    return folder


def ours(**numbers: object) -> Turn:
    case = Case(**numbers)
    stage = stage_of(case)
    shards = open_shards(stage.data)
    (task,) = stage.tasks
    units = measure(Units(ShardReader(shards)), task.objective.readers.values(), shards.cache)
    source = MicroBatches.of(stage, units, seed=0, number=0)
    with closing(load(source, slots(stage, 0, 0, stage.steps, 0, 1), workers=WORKERS)) as batches:
        rows = (part.counts["rows"] for made in batches for part in made.parts)
        return timed(rows, warmup=case.warmup, count=case.steps)


def stage_of(case: Case) -> Stage:
    numbers = dict(data=(case.data,), width=8, depth=1, heads=1, batch=case.batch, micro_batches=1, warmup=1,
                   steps=case.warmup + case.steps + 8 * WORKERS)  # fmt: skip
    if case.tokenizer:
        return bert(tokenizer=case.tokenizer, length=LENGTH, **numbers).stages[0]
    return mae(side_px=SIDE_PX, patch_px=PATCH_PX, decoder_width=8, decoder_depth=1, decoder_heads=1, **numbers).stages[
        0
    ]


def theirs(**numbers: object) -> Turn:
    import webdataset

    case = Case(**numbers)
    torch.set_num_threads(1)
    shards = sorted(str(path) for path in Path(case.data).glob("*.tar"))
    made = (
        webdataset.WebDataset(shards, shardshuffle=False, empty_check=False, nodesplitter=None)
        .repeat()
        .shuffle(1_000)
        .map(decoder_of(case))
    )
    loader = webdataset.WebLoader(
        made, batch_size=case.batch, num_workers=WORKERS, prefetch_factor=4, collate_fn=_joined
    )
    return timed((len(lengths) for _, lengths in loader), warmup=case.warmup, count=case.steps)


def _joined(samples: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """One tensor a batch, as it travels fastest between processes, and the samples' lengths."""
    return torch.cat(samples), torch.tensor([len(one) for one in samples])


def decoder_of(case: Case) -> Callable[[dict[str, Any]], torch.Tensor]:
    """What is done to each sample: the same as our reader does, by the same libraries."""
    if not case.tokenizer:
        from torchvision.transforms import v2 as transforms

        bicubic = transforms.InterpolationMode.BICUBIC
        crops = transforms.RandomResizedCrop(SIDE_PX, scale=(0.2, 1.0), interpolation=bicubic)
        return partial(_patches, transforms.Compose([crops, transforms.RandomHorizontalFlip()]))
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(case.tokenizer)
    return partial(_pieces, tokenizer)


def _pieces(tokenizer: Any, sample: dict[str, Any]) -> torch.Tensor:
    return torch.tensor(tokenizer.encode(sample["txt"].decode()).ids[:LENGTH])


def _patches(transform: Callable, sample: dict[str, Any]) -> torch.Tensor:
    import io

    from PIL import Image

    from mmpre.modalities.image_patches import patches

    picture = transform(Image.open(io.BytesIO(sample["jpg"])).convert("RGB"))
    return patches(torch.from_numpy(np.array(picture)), PATCH_PX)


CONTENDERS = {"mmpre": ours, "webdataset": theirs}

if __name__ == "__main__":
    serve(CONTENDERS)
