"""One real optimizer step of a recipe at the size of its paper: seconds, memory and parameters by part.

Rows are made up, as long as the paper's longest, and few, in one micro-batch; the vocabulary is as large as the
paper's. What is measured is the recipe's own step: forward, backward, clipping, update.
"""

import io
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import nn

from mmpre.benchmark import Comparison, Settings, Turn
from mmpre.data.codes import WithCodes
from mmpre.data.loader import MicroBatches, Slot
from mmpre.data.sample import Sample
from mmpre.modalities.dna import DnaReader
from mmpre.modalities.image_patches import ImageReader
from mmpre.modalities.regions import RegionReader
from mmpre.modalities.speech import FbankReader
from mmpre.modalities.text import TextReader
from mmpre.modalities.video import VideoReader
from mmpre.modality import Reader
from mmpre.network import Network
from mmpre.plugins import find_recipe
from mmpre.processes.processes import Processes
from mmpre.recipe import Stage
from mmpre.recipes.benchmarks.harness import serve, take_turns, timed
from mmpre.training.loop import Context, steps

description = "one optimizer step of each paper's base model: seconds, memory, parameters (--cases names recipes)"


@dataclass(frozen=True)
class Case:
    """A recipe at a scale, with the parameters that its paper states (in millions) and what of ours they count."""

    recipe: str
    scale: str
    vocabulary: int = 0
    rows: int = 4
    stated: float = 0.0
    counts: str = ""
    stage: int = 0
    numbers: Mapping[str, object] = field(default_factory=dict)
    within: float = 0.02  # how far off the stated number may be, as it is rounded

    @property
    def title(self) -> str:
        stage = f" stage {self.stage + 1}," if self.stage else ""
        return f"{self.recipe} {self.scale},{stage} {self.rows} rows"


CASES = [
    # Devlin et al. 2018, section 3: 110M and 340M; a pooler (0.6M, 1.0M), which mmpre has not, is in them
    Case("bert", "base", 30_522, stated=110, counts="modalities encoder"),
    Case("bert", "large", 30_522, rows=2, stated=340, counts="modalities encoder"),
    # the same model, in windows of 128 pieces, then of 512
    Case("two_stage", "base", 30_522, rows=16, stated=110, counts="modalities encoder"),
    Case("two_stage", "base", 30_522, stated=110, counts="modalities encoder", stage=1),
    # Chen et al. 2019, section 3.1: 86M and 303M, which is without the tables of words and positions
    Case("uniter", "base", 28_996, stated=86, counts="image encoder"),
    Case("uniter", "large", 28_996, rows=2, stated=303, counts="image encoder"),
    # Tan & Bansal 2019, the authors' code: 207.9M without heads, of which a pooler (0.6M) is counted with ours
    Case("lxmert", "base", 30_522, stated=207.9, counts="modalities encoder"),
    # Portes et al. 2023, section 3: 137M
    Case("mosaicbert", "base", 30_522, stated=137, counts="modalities encoder"),
    # Warner et al. 2024, section 2.1.2: 149M and 395M
    Case("modernbert", "base", 50_368, stated=149, counts="modalities encoder"),
    Case("modernbert", "large", 50_368, rows=2, stated=395, counts="modalities encoder"),
    # Clark et al. 2020, table 1 of the appendix: 110M and 335M, which is the discriminator
    Case("electra", "base", 30_522, stated=110, counts="modalities encoder"),
    Case("electra", "large", 30_522, rows=2, stated=335, counts="modalities encoder"),
    # Liu et al. 2021, section 3: BERT-base; the rows of a step are compared with each other
    Case("mirror_bert", "base", 30_522, rows=16, stated=110, counts="modalities encoder"),
    # Charpentier & Samuel 2024, appendix: 30M and 119M
    Case("babylm2", "small", 8_192, rows=16, stated=30, counts="modalities encoder"),
    Case("babylm2", "base", 16_384, rows=16, stated=119, counts="modalities encoder"),
    # Fu et al. 2021: the Video Swin that their released code builds, 49.5M, and BERT-base's 110M
    Case("violet", "base", 30_522, stated=159.5, counts="modalities encoder"),
    # Guo et al. 2020, section 4.1: RoBERTa-base, whose authors (Liu et al. 2019) state 125M
    Case("graphcodebert", "base", 50_265, stated=125, counts="modalities encoder"),
    # Dosovitskiy et al. 2020, table 1: 86M and 307M, without MAE's decoder
    Case("mae", "base", rows=16, stated=86, counts="modalities encoder"),
    Case("mae", "large", rows=8, stated=307, counts="modalities encoder"),
    # Chung et al. 2021, section 4: 0.6B and 1.0B, to one digit; Seamless says 600M of 580M
    Case("w2v_bert", "base", rows=2, stated=600, counts="modalities encoder", within=0.05),
    Case("w2v_bert", "xxl", rows=1, stated=1000, counts="modalities encoder", within=0.05),
    Case("w2v_bert", "v2", rows=2, stated=600, counts="modalities encoder", within=0.05),
    # Li et al. 2025, section 4: 380M in four parts
    Case("mergedna", "base", rows=1, stated=380, counts="modalities encoder"),
]


def run(settings: Settings) -> Iterator[Comparison]:
    """The base models, or those that `cases` asks for by title."""
    for case in CASES:
        if settings.cases in case.title and (settings.cases or case.scale == "base"):
            arguments = {"case": case.title, "steps": settings.steps or 1}
            turns = take_turns(__name__, ["mmpre"], arguments, settings, case.title)
            about = {"stated": case.stated, "of": case.counts, "rows": case.rows}
            yield Comparison(title=case.title, unit="step", turns=turns, about=about, per_second=False)


def mmpre(case: str, steps: int) -> Turn:
    return measure(next(one for one in CASES if one.title == case), steps)


def measure(case: Case, count: int) -> Turn:
    """Make `count` steps after a first one, which is not timed; "M" are millions of parameters."""
    found = find_recipe(case.recipe)
    numbers = found.defaults(case.scale) | dict(case.numbers)
    with tempfile.TemporaryDirectory() as folder:
        if case.vocabulary:
            numbers["tokenizer"] = _words(Path(folder) / "tokenizer.json", case.vocabulary)
        torch.manual_seed(0)
        recipe = found.function(**numbers)
    module, stage = recipe.module(), replace(recipe.stages[case.stage], batch=case.rows, micro_batches=1, ramp=None)
    source = MicroBatches.of(stage, Made(_readers(stage), case.rows), seed=0, number=case.stage)
    optimizer = stage.optimizer.build(module.named_parameters())
    order = (Slot(step, 0, stage.task_at(step, 0).name, 0, case.rows) for step in range(count + 1))
    made = steps(
        stage, module, optimizer, (source[slot] for slot in order),
        Context(0, case.stage, Processes()), first=0, last=count + 1, averages=recipe.averages(case.stage),
    )  # fmt: skip
    tokens = []

    def each() -> Iterator[float]:
        for one in made:
            if one.skipped:
                raise RuntimeError(f"bench step, {case.title}: a loss or gradient was not finite")
            tokens.append(one.counts["tokens"])
            yield 1.0

    turn = timed(each(), warmup=1, count=count)
    millions = {f"{part} M": size / 1e6 for part, size in parameters(module, recipe.network).items()}
    if case.stated:
        counted = sum(_part(recipe.network, part) for part in case.counts.split())
        millions |= {"counted M": counted / 1e6, "paper M": case.stated}
    return replace(turn, more={"tokens": tokens[-1], **millions})


def parameters(module: nn.Module, network: nn.Module) -> dict[str, int]:
    """How many there are in all, in the modalities, the encoder, and the rest (heads, decoders)."""
    every = sum(parameter.numel() for parameter in module.parameters())
    parts = {part: _part(network, part) for part in ("modalities", "encoder")} if isinstance(network, Network) else {}
    return {"all": every, **parts, "rest": every - sum(parts.values())}


def _readers(stage: Stage) -> dict[str, Reader]:
    """What reads the rows of the first task, by its own view where it has one that says so."""
    task = stage.tasks[0]
    return {**task.objective.readers, **getattr(task.view, "readers", {})}


def _part(network: Network, name: str) -> int:
    part = getattr(network, name) if hasattr(network, name) else network.modalities[name]
    return sum(parameter.numel() for parameter in part.parameters())


class Made:
    """Units that are made up: for every reader what fills its longest row."""

    def __init__(self, readers: Mapping[str, Reader], count: int) -> None:
        self.readers, self.count = readers, count

    def __len__(self) -> int:
        return max(self.count, 2)

    def lengths(self, units: np.ndarray) -> None:
        return None

    def identity(self, number: int) -> tuple[str, str]:
        return "made up", f"{number}"

    def sample(self, number: int) -> Sample:
        members = {}
        for reader in self.readers.values():
            make = next((make for kind, make in MAKERS.items() if isinstance(reader, kind)), None)
            if make is not None:
                made = make(reader, number)
            elif hasattr(reader, "made"):
                made = reader.made()
            else:
                raise ValueError(f"bench step: nothing makes up samples for a {type(reader).__name__}; add to MAKERS")
            members |= made if isinstance(made, Mapping) else {reader.suffixes[0]: made}
        return Sample(f"{number}", "made up", "", members)


def text(reader: TextReader, number: int) -> bytes:
    """Words that are one piece each, as many as fit between [CLS] and [SEP]."""
    rng = random.Random(number)
    return " ".join(f"w{rng.randrange(1000)}" for _ in range(reader.max_length - 2)).encode()


def regions(reader: RegionReader, number: int) -> bytes:
    g = torch.Generator().manual_seed(number)
    low, size = (torch.rand(reader.max_regions, 2, generator=g) * 0.4 + 0.1 for _ in range(2))
    tensors = {
        "features": torch.randn(reader.max_regions, reader.features, generator=g).half(),
        "boxes": torch.cat([low, low + size, size, size.prod(1, keepdim=True)], 1),
    }
    if reader.classes:
        tensors["soft"] = torch.randn(reader.max_regions, reader.classes, generator=g).softmax(1)
    for name, count in reader.labels.items():
        tensors[name] = torch.randint(count, (reader.max_regions,), generator=g)
        tensors[f"{name}_confidence"] = torch.rand(reader.max_regions, generator=g)
    return safetensors.torch.save(tensors)


def picture(reader: ImageReader, number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG" if reader.suffixes[0] == "png" else "JPEG")
    return file.getvalue()


def made_up(reader: FbankReader | VideoReader | WithCodes | DnaReader, number: int) -> Mapping[str, bytes]:
    return reader.made()


MAKERS: dict[type, Callable[..., bytes | Mapping[str, bytes]]] = {
    TextReader: text, RegionReader: regions, ImageReader: picture, FbankReader: made_up, VideoReader: made_up,
    WithCodes: made_up, DnaReader: made_up,
}  # fmt: skip


def _words(path: Path, size: int) -> str:
    """A tokenizer of `size` pieces: BERT's special tokens, and words w0, w1 ..."""
    names: Sequence[str] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    names = [*names, *(f"w{i}" for i in range(size - len(names)))]
    added = [
        {"id": i, "content": name, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for i, name in enumerate(names[:5])
    ]  # fmt: skip
    told = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {name: i for i, name in enumerate(names)}, "unk_token": "[UNK]"},
    }  # fmt: skip
    path.write_text(json.dumps(told))
    return str(path)


if __name__ == "__main__":
    serve({"mmpre": mmpre})
