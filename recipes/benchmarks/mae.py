"""MAE's training step against transformers' ViTMAEForPreTraining, on the same pictures in the same order.

Both have the same sizes, random crops, share of hidden patches, normalised targets, optimizer (torch's fused AdamW)
and one loading worker. Squares are cut from all pictures, so neither side pads.

    packed         mmpre: bytes are moved and normalised where they are read, the last decoder layer and the head run
                   at hidden patches only
    transformers   ViTMAEForPreTraining, pictures as normalised float tensors, a plain loop
"""

import itertools
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmpre.benchmark import Comparison, Settings, Turn
from mmpre.data.index import open_shards
from mmpre.data.loader import MicroBatches, load, slots
from mmpre.data.shards import ShardReader
from mmpre.data.units import Units
from mmpre.modalities.image_patches import DEVIATION, MEAN, random_crops
from mmpre.processes.processes import Processes
from mmpre.recipe import Recipe
from mmpre.recipes.benchmarks.harness import serve, take_turns, timed
from mmpre.recipes.benchmarks.pictures import write_pictures
from mmpre.recipes.mae import mae
from mmpre.training.loop import Context
from mmpre.training.loop import steps as train_steps

description = "MAE's training step against transformers' ViTMAEForPreTraining"

AHEAD = 6  # steps that are loaded beyond the last one, so that loading goes on while the last ones are timed
PICTURES = 256


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and settings that both contenders share. `batch` pictures make a step."""

    data: str
    width: int
    depth: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    patch_px: int
    side_px: int
    batch: int
    steps: int
    warmup: int = 2
    bf16: bool = False

    @property
    def heads(self) -> int:
        return max(1, self.width // 64)

    @property
    def tokens(self) -> int:
        """Clean tokens of a picture: its patches and [CLS]."""
        return (self.side_px // self.patch_px) ** 2 + 1


SIZES = {
    "6 x 256": dict(width=256, depth=6, decoder_width=128, decoder_depth=4, decoder_heads=4, patch_px=8, side_px=96,
                    batch=32, steps=6),
    "ViT-B": dict(width=768, depth=12, decoder_width=512, decoder_depth=8, decoder_heads=16, patch_px=16, side_px=224,
                  batch=8, steps=3, warmup=1),
}  # fmt: skip
USUAL = ("6 x 256, float32", "ViT-B, float32", "ViT-B, bfloat16")  # what is run where no case is asked for


def run(settings: Settings) -> Iterator[Comparison]:
    titles = {
        f"{size}, {precision}": dict(numbers, bf16=precision == "bfloat16")
        for (size, numbers), precision in itertools.product(SIZES.items(), ("float32", "bfloat16"))
        if settings.cases in (title := f"{size}, {precision}") and (settings.cases or title in USUAL)
    }
    if not titles:
        return
    with TemporaryDirectory(prefix="mmpre-bench-") as folder:
        shards = write_pictures(Path(folder), PICTURES, side_px=(200, 300))
        for title, numbers in titles.items():
            numbers["steps"] = settings.steps or numbers["steps"]
            case = Case(data=str(shards), **numbers)
            turns = take_turns(__spec__.name, list(CONTENDERS), asdict(case), settings, title)
            about = {name: value for name, value in asdict(case).items() if name != "data"}
            yield Comparison(title=title, unit="pictures", turns=turns, about=about)


def packed(**numbers: object) -> Turn:
    case = Case(**numbers)
    recipe = recipe_of(case)
    stage, module = recipe.stages[0], recipe.module()
    optimizer, context = stage.optimizer.build(module.named_parameters()), Context(0, 0, Processes(), bf16=case.bf16)
    total = case.warmup + case.steps
    with closing(load(source_of(case, recipe), slots(stage, 0, 0, total + AHEAD, 0, 1), workers=1)) as batches:
        steps = train_steps(stage, module, optimizer, batches, context, first=0, last=total)
        pictures = (step.counts["rows"] for step in steps)
        return timed(pictures, warmup=case.warmup, count=case.steps)


def recipe_of(case: Case) -> Recipe:
    torch.manual_seed(0)
    return mae(
        data=(case.data,), width=case.width, depth=case.depth, heads=case.heads, decoder_width=case.decoder_width,
        decoder_depth=case.decoder_depth, decoder_heads=case.decoder_heads, patch_px=case.patch_px,
        side_px=case.side_px, batch=case.batch, micro_batches=1, steps=case.warmup + case.steps + AHEAD, warmup=1,
    )  # fmt: skip


def source_of(case: Case, recipe: Recipe) -> MicroBatches:
    """What makes the micro-batches of a step."""
    return MicroBatches.of(recipe.stages[0], Units(ShardReader(open_shards(case.data))), seed=0, number=0)


def theirs(**numbers: object) -> Turn:
    """Train ViTMAEForPreTraining by a plain loop."""
    case = Case(**numbers)
    torch.manual_seed(0)
    model = their_model(case).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.5e-4 * case.batch / 256, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    count = case.batch * (case.warmup + case.steps + AHEAD)
    loader = DataLoader(Pictures(case, count), batch_size=case.batch, num_workers=1, prefetch_factor=4)

    def steps() -> Iterator[int]:
        for pixels_B3HW in loader:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.bf16):
                loss = model(pixels_B3HW).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            yield len(pixels_B3HW)

    return timed(steps(), warmup=case.warmup, count=case.steps)


def their_model(case: Case) -> torch.nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.ViTMAEConfig(
        hidden_size=case.width, num_hidden_layers=case.depth, num_attention_heads=case.heads,
        intermediate_size=4 * case.width, image_size=case.side_px, patch_size=case.patch_px,
        decoder_hidden_size=case.decoder_width, decoder_num_hidden_layers=case.decoder_depth,
        decoder_num_attention_heads=case.decoder_heads, decoder_intermediate_size=4 * case.decoder_width,
        layer_norm_eps=1e-6, mask_ratio=0.75, norm_pix_loss=True,
    )  # fmt: skip
    return transformers.ViTMAEForPreTraining(config)


class Pictures(Dataset):
    """The pictures in the order that packed reads them, cut and normalised as ViTMAE wants them."""

    def __init__(self, case: Case, count: int) -> None:
        from torchvision.transforms import v2 as transforms

        source = source_of(case, recipe_of(case))
        units = source.order.units(np.arange(count)).tolist()
        self.samples = [source.units.sample(unit) for unit in units]
        floats = [transforms.ToImage(), transforms.ToDtype(torch.float32, scale=True)]
        self.transform = transforms.Compose(
            [random_crops(case.side_px), *floats, transforms.Normalize(MEAN, DEVIATION)]
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transform(self.samples[i].image())


CONTENDERS = {"packed": packed, "transformers": theirs}

if __name__ == "__main__":
    serve(CONTENDERS)
