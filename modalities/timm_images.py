"""Pictures through a model of timm: its last feature map, one token a place. A front of a network, or a tower alone.

A tower is `Tower(Network({"image": TimmImages(...)}, Encoder([])), Mean("image"))`; with blocks in the encoder the
model is a front whose places the blocks compare.
"""
# N tokens of the packed batch, B pictures of n tokens each, S side in pixels, E channels of the map, D model width

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn

from mmpre.data.sample import IMAGE_FORMATS, Sample, picture_member
from mmpre.draw import Draw
from mmpre.show import GREY, enlarged
from mmpre.tokens import Ragged, Tokens

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class SquareReader:
    """Reads a picture as a square of `side_px`, and as (side_px / stride_px)^2 tokens, row after row.

    `transform` (of torchvision, say) is called first, its randomness drawn from the row; a result of another size is
    resized (bicubic, proportions lost: crop in the transform to keep them). Fields: pixels [1, 3, S, S] as bytes, one
    entry a picture; place [n], the number of each token's place. A broken picture raises BadMember.
    """

    side_px: int
    stride_px: int
    transform: Callable[[Image.Image], Image.Image] | None = None
    suffixes: tuple[str, ...] = tuple(IMAGE_FORMATS)

    def __post_init__(self) -> None:
        if self.stride_px < 1 or self.side_px < self.stride_px or self.side_px % self.stride_px:
            raise ValueError(
                f"SquareReader: side_px must be a multiple of stride_px (what the model's map is smaller by), got "
                f"side_px {self.side_px} and stride_px {self.stride_px}"
            )

    @property
    def count(self) -> int:
        """Tokens of a picture."""
        return (self.side_px // self.stride_px) ** 2

    def tokenize(self, sample: Sample, draw: Draw) -> Tokens:
        picture = sample.image(self.suffixes)
        if self.transform is not None:
            with draw.seeding_torch("transform"):
                picture = self.transform(picture)
        picture = picture.convert("RGB").resize((self.side_px, self.side_px), Image.Resampling.BICUBIC)
        pixels_13SS = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].contiguous()
        return Tokens.of_row(
            torch.full((self.count,), -1), pixels=Ragged(pixels_13SS, torch.tensor([1])), place=torch.arange(self.count)
        )

    def still(self) -> "SquareReader":
        """The same without chance: a transform gives way to its `still`, where it has one."""
        return replace(self, transform=getattr(self.transform, "still", self.transform))

    def made(self) -> dict[str, bytes]:
        """A blank square."""
        return picture_member(Image.new("RGB", (self.side_px, self.side_px)), self.suffixes)

    def show(self, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None = None) -> Image.Image:
        """A picture of a row: the square, with what hidden tokens stand for in grey."""
        places, pixels_SS3 = self.side_px // self.stride_px, tokens["pixels"][0].permute(1, 2, 0).clone()
        hidden_hw = torch.zeros(places**2, dtype=torch.bool).index_put((tokens["place"].long(),), hidden_N)
        pixels_SS3[torch.kron(hidden_hw.view(places, places), torch.ones(2 * (self.stride_px,)).bool())] = GREY
        return enlarged(Image.fromarray(pixels_SS3.numpy()))


def plain_reader(sample: Sample) -> SquareReader:
    """A reader of ordinary settings, for `mmpre data inspect`: a ConvNeXt's or a Swin's map."""
    return SquareReader(224, 32)


class TimmImages(nn.Module):
    """W f + b + place, where f is the model's feature map and a replaced token is a learned vector in place of W f + b.

    `model` comes from `timm.create_model(name, num_classes=0)`; maps [B, E, h, w], [B, h, w, E] and token lists with
    prefix tokens are read. `frozen` keeps its weights and its running statistics as they are. Pixels are normalised by
    the mean and deviation that the model names.
    """

    def __init__(self, reader: SquareReader, model: nn.Module, *, width: int, frozen: bool = False) -> None:
        super().__init__()
        if not frozen and any(isinstance(module, BATCH_NORMS) for module in model.modules()):
            raise ValueError(
                f"TimmImages: {type(model).__name__} has batch normalisation, which lets the rows of a batch see each "
                "other; use frozen=True, or a model with layer normalisation (ViT, Swin, ConvNeXt)"
            )
        self.reader, self.model, self.frozen = reader, model, frozen
        self.project = nn.Linear(model.num_features, width)
        self.places = nn.Embedding(reader.count, width)
        self.mask_D = nn.Parameter(torch.empty(width))
        about = getattr(model, "pretrained_cfg", {})
        for name, plain in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            value_311 = torch.tensor(about.get(name, plain)).view(3, 1, 1)
            self.register_buffer(f"{name}_311", value_311, persistent=False)
        for weight in (self.project.weight, self.places.weight, self.mask_D):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.project.bias)
        model.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> "TimmImages":
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def features(self, tokens: Tokens) -> Float[Tensor, "N E"]:
        pixels_B3SS = (tokens["pixels"].to(self.mean_311.dtype) / 255 - self.mean_311) / self.std_311
        made = self.model.forward_features(pixels_B3SS)
        if made.ndim == 4:
            channels_last = str(getattr(self.model, "output_fmt", "NCHW")).upper().endswith("NHWC")
            made_BnE = made.flatten(1, 2) if channels_last else made.flatten(2).mT
        else:
            made_BnE = made[:, getattr(self.model, "num_prefix_tokens", 0) :]
        if made_BnE.shape[1] != self.reader.count:
            raise ValueError(
                f"TimmImages: the reader counts {self.reader.count} tokens a picture, {type(self.model).__name__} "
                f"gives {made_BnE.shape[1]} for {self.reader.side_px} px; set the reader's stride_px to what the "
                "model's map is smaller by"
            )
        return made_BnE.flatten(0, 1)

    def embed(self, f_NE: Float[Tensor, "N E"], tokens: Tokens, replaced_N: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        x_ND = torch.where(replaced_N[:, None], self.mask_D, self.project(f_NE))
        return x_ND + F.embedding(tokens["place"], self.places.weight)
