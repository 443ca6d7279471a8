"""RGB pictures of any size and shape as grids of square patches.

Source: patch embedding, Dosovitskiy et al. 2020, arXiv:2010.11929; fixed two-dimensional positions, random crops and
normalisation as in the authors' code of MAE, He et al. 2021, arXiv:2111.06377.
"""
# N tokens of the packed batch, n of one picture, p side of a patch, E = 3pp values of a patch, D model width

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms

from mmpre.data.sample import IMAGE_FORMATS, Sample, picture_member
from mmpre.draw import Draw
from mmpre.show import GREY, enlarged
from mmpre.tokens import Tokens

CLS = 0  # kind of special token, in Tokens.special_N
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue, white being 1
BICUBIC = transforms.InterpolationMode.BICUBIC


@dataclass(frozen=True)
class ImageReader:
    """Reads a picture as patches of `patch_px` pixels a side, row after row, behind a [CLS] token.

    `transform` (of torchvision, say) turns the decoded picture into another one; its randomness comes from the row's
    draw. What it returns is then fitted to the grid by bicubic resizing: sides become the nearest multiples of
    `patch_px`, and a picture of more than `max_patches` patches is made smaller, in its own proportions.
    Fields, one entry a token: patch [n, 3pp] as bytes (row, column, channel), position [n, 2] as row and column of the
    grid; both are 0 for [CLS]. A picture that cannot be decoded raises BadMember.
    """

    patch_px: int = 16
    transform: Callable[[Image.Image], Image.Image] | None = None
    max_patches: int = 1024
    suffixes: tuple[str, ...] = tuple(IMAGE_FORMATS)

    def __post_init__(self) -> None:
        if self.patch_px < 1 or self.max_patches < 1:
            raise ValueError(
                f"ImageReader: patch_px and max_patches must be at least 1, got patch_px {self.patch_px} and "
                f"max_patches {self.max_patches}"
            )

    def tokenize(self, sample: Sample, draw: Draw) -> Tokens:
        picture = sample.image(self.suffixes)
        if self.transform is not None:
            with draw.seeding_torch("transform"):
                picture = self.transform(picture)
            if not isinstance(picture, Image.Image):
                raise TypeError(
                    f"ImageReader: transform must return a PIL picture, got {type(picture).__name__}; leave conversion "
                    "to tensors and normalisation out of it"
                )
        rows, columns = grid(*picture.size, self.patch_px, self.max_patches)
        size_px = (columns * self.patch_px, rows * self.patch_px)
        if picture.size != size_px or picture.mode != "RGB":
            picture = resized(picture.convert("RGB"), size_px)
        patch_NE = np.zeros((1 + rows * columns, 3 * self.patch_px**2), dtype=np.uint8)  # the first one is [CLS]
        patch_NE[1:] = patches(np.asarray(picture), self.patch_px)
        special_N = torch.full((len(patch_NE),), -1)
        special_N[0] = CLS
        return Tokens.of_row(special_N, patch=torch.from_numpy(patch_NE), position=_places(rows, columns))

    def still(self) -> "ImageReader":
        """The same without chance: a transform gives way to its `still`, where it has one (`random_crops`)."""
        return replace(self, transform=getattr(self.transform, "still", self.transform))

    def made(self) -> dict[str, bytes]:
        """A blank square of as many patches as a picture may have."""
        side_px = math.isqrt(self.max_patches) * self.patch_px
        return picture_member(Image.new("RGB", (side_px, side_px)), self.suffixes)

    def show(self, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None = None) -> Image.Image:
        """A picture of a row: its patches in their places, hidden ones grey."""
        ordinary_N = tokens.special_N < 0
        patch_nE, place_n2 = tokens["patch"][ordinary_N].clone(), tokens["position"][ordinary_N].long()
        patch_nE[hidden_N[ordinary_N]] = GREY
        rows, columns = (int(side) for side in place_n2.amax(0) + 1)
        whole_nE = patch_nE.new_full((rows * columns, patch_nE.shape[1]), 255)
        whole_nE[place_n2[:, 0] * columns + place_n2[:, 1]] = patch_nE
        return enlarged(Image.fromarray(picture(whole_nE, rows, columns).numpy()))


def plain_reader(sample: Sample) -> ImageReader:
    """A reader of ordinary settings, for `mmpre data inspect`."""
    return ImageReader(16, middle(224))


@lru_cache(maxsize=256)
def _places(rows: int, columns: int) -> Int[Tensor, "N 2"]:
    """Row and column of [CLS] (0) and of each place of a grid."""
    return F.pad(torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).int(), (0, 0, 1, 0))


def grid(width_px: int, height_px: int, patch_px: int, max_patches: int) -> tuple[int, int]:
    """Rows and columns of patches for a picture: at least 1 of each, together at most `max_patches`."""
    shrink = min(1.0, math.sqrt(max_patches * patch_px**2 / (width_px * height_px)))
    rows, columns = (max(1, round(side * shrink / patch_px)) for side in (height_px, width_px))
    if rows * columns > max_patches:  # by rounding, or because one side was less than a patch
        rows, columns = (rows, max_patches // rows) if rows <= columns else (max_patches // columns, columns)
    return rows, columns


def patches(picture_HW3: UInt8[np.ndarray | Tensor, "H W 3"], patch_px: int) -> UInt8[np.ndarray | Tensor, "n E"]:
    """Cut a picture whose sides are multiples of `patch_px` into patches, row after row."""
    return rearrange(picture_HW3, "(h p) (w q) c -> (h w) (p q c)", p=patch_px, q=patch_px)


def picture(patch_nE: Tensor, rows: int, columns: int) -> Tensor:
    """Put a picture's patches together again, as [height, width, 3]."""
    patch_px = math.isqrt(patch_nE.shape[1] // 3)
    return rearrange(patch_nE, "(h w) (p q c) -> (h p) (w q) c", h=rows, w=columns, p=patch_px, q=patch_px)


def resized(picture: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    """An RGB picture at another width and height, bicubic, with all pixels of what is made smaller.

    Torch works on bytes here, in a quarter of Pillow's time; less than one value in a hundred differs, mostly by 1.
    """
    picture_1HW3 = torch.from_numpy(np.array(picture))[None]
    made_13HW = F.interpolate(picture_1HW3.permute(0, 3, 1, 2), size_px[::-1], mode="bicubic", antialias=True)
    return Image.fromarray(made_13HW[0].permute(1, 2, 0).numpy())


class _RandomCrop(transforms.RandomResizedCrop):
    """Torchvision's crops, resized by `resized`."""

    def transform(self, picture: Image.Image, params: dict[str, int]) -> Image.Image:
        top, left, height, width = (params[name] for name in ("top", "left", "height", "width"))
        return resized(picture.crop((left, top, left + width, top + height)), (self.size[1], self.size[0]))


def random_crops(side_px: int, *, least: float = 0.2) -> Callable[[Image.Image], Image.Image]:
    """Squares of `side_px` cut at random, resized (bicubic) and flipped half of the time: MAE's augmentation.

    A crop has between `least` and all of the picture's area, and sides of a ratio of 3:4 to 4:3. Without chance
    (`still`) it is the square in the middle.
    """
    crop = _RandomCrop(side_px, scale=(least, 1.0))
    made = transforms.Compose([crop, transforms.RandomHorizontalFlip()])
    made.still = middle(side_px)
    return made


def middle(side_px: int) -> Callable[[Image.Image], Image.Image]:
    """The square in the middle, at `side_px`: nothing is random."""
    return transforms.Compose([transforms.Resize(side_px, interpolation=BICUBIC), transforms.CenterCrop(side_px)])


class SinCos(nn.Module):
    """Fixed vectors for rows and columns of a grid: sine and cosine of the column, then of the row; 0 for [CLS].

    Frequencies fall from 1 to 1/10,000. Half of the width tells the column and comes first, as in the authors' code.
    """

    def __init__(self, width: int, most: int) -> None:
        """`most` is the number of rows or columns that a grid may have."""
        super().__init__()
        if width % 4:
            raise ValueError(f"SinCos: width must be a multiple of 4 (sine and cosine, row and column), got {width}")
        rate_F = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
        angle_SF = torch.arange(most, dtype=torch.float64)[:, None] * rate_F
        table_SH = torch.cat([angle_SF.sin(), angle_SF.cos()], dim=1).float()
        self.register_buffer("table_SH", table_SH, persistent=False)

    def forward(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        row_N, column_N = tokens["position"].unbind(1)
        place_ND = torch.cat([F.embedding(column_N, self.table_SH), F.embedding(row_N, self.table_SH)], dim=1)
        return place_ND.masked_fill((tokens.special_N >= 0)[:, None], 0.0)


class LearnedGrid(nn.Module):
    """A learned vector for each place of a grid of one size, as in ViT; 0 for [CLS], which has a vector of its own."""

    def __init__(self, width: int, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.table_PD = nn.Parameter(torch.empty(rows * columns, width))
        nn.init.normal_(self.table_PD, std=0.02)

    def forward(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        row_N, column_N = tokens["position"].unbind(1)
        outside_N = (row_N >= self.rows) | (column_N >= self.columns)
        if outside_N.device.type == "cpu" and outside_N.any():  # elsewhere the lookup fails, without the numbers
            raise ValueError(
                f"LearnedGrid: positions reach to {self.rows} x {self.columns} patches, a picture has "
                f"{int(row_N.max()) + 1} x {int(column_N.max()) + 1}; let the reader cut squares of one size"
            )
        place_N = torch.where(outside_N, len(self.table_PD), row_N * self.columns + column_N)
        return F.embedding(place_N, self.table_PD).masked_fill((tokens.special_N >= 0)[:, None], 0.0)


class ImagePatches(nn.Module):
    """W patch + b + position, where a replaced patch is a learned vector, and [CLS] another one without a position.

    Pixels are normalised by ImageNet's mean and deviation of each channel. `places` gives the positions, by default
    fixed ones (`SinCos`).
    """

    def __init__(self, reader: ImageReader, *, width: int, places: nn.Module | None = None) -> None:
        super().__init__()
        self.reader, size = reader, 3 * reader.patch_px**2
        self.project = nn.Linear(size, width)
        self.cls_D = nn.Parameter(torch.empty(width))
        self.mask_D = nn.Parameter(torch.empty(width))
        self.places = places or SinCos(width, reader.max_patches)
        mean_E, deviation_E = (torch.tensor(one).repeat(size // 3) for one in (MEAN, DEVIATION))
        self.register_buffer("scale_E", 1 / (255 * deviation_E), persistent=False)
        self.register_buffer("shift_E", -mean_E / deviation_E, persistent=False)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        for vector_D in (self.cls_D, self.mask_D):
            nn.init.normal_(vector_D, std=0.02)

    def features(self, tokens: Tokens) -> Float[Tensor, "N E"]:
        return torch.addcmul(self.shift_E, tokens["patch"].to(self.scale_E.dtype), self.scale_E)

    def restored(self, tokens: Tokens, f_NE: Float[Tensor, "N E"]) -> Tokens:
        """The tokens that have these features, their values as bytes again."""
        byte_NE = ((f_NE - self.shift_E) / self.scale_E).round().clamp(0, 255).to(torch.uint8)
        return tokens.with_values(patch=byte_NE)

    def embed(self, f_NE: Float[Tensor, "N E"], tokens: Tokens, replaced_N: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        x_ND = torch.where(replaced_N[:, None], self.mask_D, self.project(f_NE))
        x_ND = torch.where((tokens.special_N == CLS)[:, None], self.cls_D, x_ND)
        return x_ND + self.places(tokens)
