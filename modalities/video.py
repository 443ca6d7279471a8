"""Video of any length, size and shape as tubelets: some frames deep, a square of pixels wide; one frame deep, patches.

Source: tubelets, Arnab et al. 2021 (ViViT), arXiv:2103.15691; fixed positions in time, row and column as in the
authors' code of V-JEPA, Bardes et al. 2024, arXiv:2404.08471; learned ones as in MAE for video, Feichtenhofer et al.
2022, arXiv:2205.09113.
"""
# N tokens of the packed batch, n of one clip, T frames, t frames of a tubelet, p its side, E = 3tpp, D model width

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import v2 as transforms

from mmpre.data.sample import Sample
from mmpre.data.video import Segments, Video
from mmpre.draw import Draw
from mmpre.show import GREY, WIDTH_PX, enlarged
from mmpre.tokens import Tokens

CLS = 0  # kind of special token, in Tokens.special_N
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue, white being 1
BICUBIC = transforms.InterpolationMode.BICUBIC


@dataclass(frozen=True)
class VideoReader:
    """Reads a clip as tubelets of `frames` frames and `patch_px` pixels a side, frame after frame, row after row.

    `transform` (of torchvision, say) turns all frames, [T, 3, H, W] as bytes, into others at once, so they are cut
    alike; its randomness comes from the row's draw. What it returns is fitted to the grid by bicubic resizing: sides
    become the nearest multiples of `patch_px`, and frames of more than `max_patches` patches are made smaller. Frames
    that do not fill a tubelet are left out; a clip with too few for one has its last frame repeated.
    Fields, one entry a token: tubelet [n, 3tpp] as bytes (frame, row, column, channel), position [n, 3] as tubelet in
    time, row and column of the grid; both are 0 for [CLS], which comes first. With `cls_each`, a [CLS] comes before
    the first tubelet of every time, and its position says which. A bad member raises BadMember.
    """

    video: Video = field(default_factory=Video)
    patch_px: int = 16
    frames: int = 2
    transform: Callable[[UInt8[Tensor, "T 3 H W"]], UInt8[Tensor, "T 3 h w"]] | None = None
    max_patches: int = 256
    cls_each: bool = False

    def __post_init__(self) -> None:
        if min(self.patch_px, self.frames, self.max_patches) < 1:
            raise ValueError(
                f"VideoReader: patch_px, frames and max_patches must be at least 1, got patch_px {self.patch_px}, "
                f"frames {self.frames} and max_patches {self.max_patches}"
            )

    @property
    def suffixes(self) -> tuple[str, ...]:
        return self.video.suffixes

    def still(self) -> "VideoReader":
        """The same without chance: frames of the middle, and a transform gives way to its `still`, where it has one."""
        video = replace(self.video, sampling=self.video.sampling.still())
        return replace(self, video=video, transform=getattr(self.transform, "still", self.transform))

    def made(self) -> dict[str, bytes]:
        """An animation of as many frames and patches as are taken, each of another grey."""
        side_px = min(self.video.side_px, math.isqrt(self.max_patches) * self.patch_px)
        kind, data = next((one for one in ("gif", "webp") if one in self.suffixes), None), io.BytesIO()
        if kind is None:
            raise ValueError(f"VideoReader.made: makes gif or webp, but reads {', '.join(self.suffixes)} alone")
        frames = [Image.new("L", (side_px, side_px), 8 * i % 256) for i in range(self.video.sampling.count)]
        frames[0].save(data, kind, save_all=True, append_images=frames[1:], duration=40)
        return {kind: data.getvalue()}

    def tokenize(self, sample: Sample, draw: Draw) -> Tokens:
        clip_T3HW = self.video.frames(sample, draw.child("frames")).permute(0, 3, 1, 2)
        if self.transform is not None:
            with draw.seeding_torch("transform"):
                clip_T3HW = self.transform(clip_T3HW)
            if clip_T3HW.ndim != 4 or clip_T3HW.shape[1] != 3 or clip_T3HW.dtype != torch.uint8:
                raise TypeError(
                    f"VideoReader: transform must return frames as bytes, [T, 3, H, W], got {clip_T3HW.dtype} of "
                    f"shape {list(clip_T3HW.shape)}; leave normalisation out of it"
                )
        rows, columns = grid(*clip_T3HW.shape[2:], self.patch_px, self.max_patches)
        size_px = [rows * self.patch_px, columns * self.patch_px]
        if list(clip_T3HW.shape[2:]) != size_px:
            clip_T3HW = transforms.functional.resize(clip_T3HW, size_px, BICUBIC, antialias=True)
        if len(clip_T3HW) < self.frames:
            last_T = torch.arange(self.frames).clamp(max=len(clip_T3HW) - 1)
            clip_T3HW = clip_T3HW[last_T]
        times = len(clip_T3HW) // self.frames
        tubelet_nE = tubelets(clip_T3HW[: times * self.frames], self.frames, self.patch_px)
        position_n3 = torch.cartesian_prod(*map(torch.arange, (times, rows, columns))).int()
        heads = times if self.cls_each else 1
        tubelet_hnE, position_hn3 = (one_n.unflatten(0, (heads, -1)) for one_n in (tubelet_nE, position_n3))
        special_hN = torch.full((heads, tubelet_hnE.shape[1] + 1), -1)
        special_hN[:, 0] = CLS
        tubelet_hNE, position_hN3 = (F.pad(one_hn, (0, 0, 1, 0)) for one_hn in (tubelet_hnE, position_hn3))
        position_hN3[:, 0, 0] = torch.arange(heads)
        return Tokens.of_row(
            special_hN.flatten(), tubelet=tubelet_hNE.flatten(0, 1), position=position_hN3.flatten(0, 1)
        )

    def show(self, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None = None) -> Image.Image:
        """The first frame of each tubelet side by side, with what is hidden in grey."""
        ordinary_N = tokens.special_N < 0
        tubelet_nE, place_n3 = tokens["tubelet"][ordinary_N].clone(), tokens["position"][ordinary_N].long()
        tubelet_nE[hidden_N[ordinary_N]] = GREY
        times, rows, columns = (int(side) for side in place_n3.amax(0) + 1)
        whole_nE = tubelet_nE.new_full((times * rows * columns, tubelet_nE.shape[1]), 255)
        whole_nE[(place_n3[:, 0] * rows + place_n3[:, 1]) * columns + place_n3[:, 2]] = tubelet_nE
        first_THW3 = clip(whole_nE, rows, columns, self.frames)[:: self.frames]
        gap_TH43 = first_THW3.new_full((*first_THW3.shape[:2], 4, 3), 255)
        strip_HW3 = rearrange(torch.cat([first_THW3, gap_TH43], 2), "t h w c -> h (t w) c")
        return enlarged(Image.fromarray(strip_HW3.numpy()), side_px=WIDTH_PX)


def plain_reader(sample: Sample) -> VideoReader:
    """A reader of ordinary settings, for `mmpre data inspect`."""
    return VideoReader(Video(sampling=Segments(16)), transform=middle(112))


def grid(height_px: int, width_px: int, patch_px: int, max_patches: int) -> tuple[int, int]:
    """Rows and columns of patches for a frame: at least 1 of each, together at most `max_patches`."""
    shrink = min(1.0, math.sqrt(max_patches * patch_px**2 / (width_px * height_px)))
    rows, columns = (max(1, round(side * shrink / patch_px)) for side in (height_px, width_px))
    if rows * columns > max_patches:  # by rounding, or because one side was less than a patch
        rows, columns = (rows, max_patches // rows) if rows <= columns else (max_patches // columns, columns)
    return rows, columns


def tubelets(clip_T3HW: UInt8[Tensor, "T 3 H W"], frames: int, patch_px: int) -> UInt8[Tensor, "n E"]:
    """Cut a clip whose frames and sides are whole multiples into tubelets, frame after frame, row after row."""
    return rearrange(
        clip_T3HW, "(t f) c (h p) (w q) -> (t h w) (f p q c)", f=frames, p=patch_px, q=patch_px
    ).contiguous()


def clip(tubelet_nE: Tensor, rows: int, columns: int, frames: int) -> Tensor:
    """Put a clip's tubelets of `frames` frames together again, as [T, height, width, 3]."""
    side = math.isqrt(tubelet_nE.shape[1] // (3 * frames))
    return rearrange(
        tubelet_nE, "(t h w) (f p q c) -> (t f) (h p) (w q) c", h=rows, w=columns, f=frames, p=side, q=side
    )


def random_crops(side_px: int, *, least: float = 0.5, flip: bool = False) -> Callable[[Tensor], Tensor]:
    """The same square of `side_px` cut at random from all frames, resized (bicubic); with `flip`, turned half the time.

    A crop has between `least` and all of a frame's area, and sides of a ratio of 3:4 to 4:3. Flipping is wrong where
    captions say left and right. Without chance (`still`) it is the square in the middle.
    """
    crop = transforms.RandomResizedCrop(side_px, scale=(least, 1.0), interpolation=BICUBIC)
    made = transforms.Compose([crop, *([transforms.RandomHorizontalFlip()] if flip else [])])
    made.still = middle(side_px)
    return made


def middle(side_px: int) -> Callable[[Tensor], Tensor]:
    """The square in the middle of all frames, at `side_px`: nothing is random."""
    return transforms.Compose([transforms.Resize(side_px, interpolation=BICUBIC), transforms.CenterCrop(side_px)])


@dataclass(frozen=True)
class Padded:
    """All of each frame in a square of `side_px`, black beside it or above and below: nothing is random."""

    side_px: int

    def __call__(self, clip_T3HW: UInt8[Tensor, "T 3 H W"]) -> UInt8[Tensor, "T 3 S S"]:
        height, width = clip_T3HW.shape[2:]
        x, y = max(0, height - width), max(0, width - height)
        clip_T3HW = F.pad(clip_T3HW, (x // 2, x - x // 2, y // 2, y - y // 2))
        return transforms.functional.resize(clip_T3HW, [self.side_px, self.side_px], BICUBIC, antialias=True)


class SinCos(nn.Module):
    """Fixed vectors for places in time, row and column: sine and cosine of each, one after the other; 0 for [CLS].

    Frequencies fall from 1 to 1/10,000. Half of the width tells the time, a quarter the row, a quarter the column.
    """

    def __init__(self, width: int, most: int) -> None:
        """`most` is the number of tubelets in time, rows or columns that a clip may have."""
        super().__init__()
        if width % 8:
            raise ValueError(f"SinCos: width must be a multiple of 8 (half for time, the rest halved), got {width}")
        for name, size in (("time_SH", width // 4), ("side_SQ", width // 8)):
            rate_F = 10_000.0 ** -(torch.arange(size, dtype=torch.float64) / size)
            angle_SF = torch.arange(most, dtype=torch.float64)[:, None] * rate_F
            self.register_buffer(name, torch.cat([angle_SF.sin(), angle_SF.cos()], dim=1).float(), persistent=False)

    def forward(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        time_N, row_N, column_N = tokens["position"].unbind(1)
        tables = (time_N, self.time_SH), (row_N, self.side_SQ), (column_N, self.side_SQ)
        place_ND = torch.cat([F.embedding(place_N, table) for place_N, table in tables], dim=1)
        return place_ND.masked_fill((tokens.special_N >= 0)[:, None], 0.0)


class Learned(nn.Module):
    """A learned vector for each place in time plus one for each place of a grid of one size; 0 for [CLS]."""

    def __init__(self, width: int, times: int, rows: int, columns: int) -> None:
        super().__init__()
        self.most = (times, rows, columns)
        self.time, self.place = nn.Embedding(times, width), nn.Embedding(rows * columns, width)
        for table in (self.time, self.place):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        position_N3 = tokens["position"]
        if position_N3.device.type == "cpu" and (position_N3 >= position_N3.new_tensor(self.most)).any():
            have = " x ".join(str(int(most) + 1) for most in position_N3.amax(0))
            raise ValueError(
                f"Learned: positions reach to {' x '.join(map(str, self.most))} (time, rows, columns), a clip has "
                f"{have}; let the reader take fewer frames and cut squares of one size"
            )
        time_N, row_N, column_N = position_N3.unbind(1)
        place_ND = self.time(time_N) + self.place(row_N * self.most[2] + column_N)
        return place_ND.masked_fill((tokens.special_N >= 0)[:, None], 0.0)


class VideoTubelets(nn.Module):
    """W tubelet + b + position, where a replaced tubelet is a learned vector, and [CLS] another one without a position.

    Pixels are normalised by ImageNet's mean and deviation of each channel. `places` gives the positions, by default
    fixed ones (`SinCos`).
    """

    def __init__(self, reader: VideoReader, *, width: int, places: nn.Module | None = None) -> None:
        super().__init__()
        self.reader, size = reader, 3 * reader.frames * reader.patch_px**2
        self.project = nn.Linear(size, width)
        self.cls_D = nn.Parameter(torch.empty(width))
        self.mask_D = nn.Parameter(torch.empty(width))
        self.places = places or SinCos(width, max(reader.max_patches, reader.video.sampling.count))
        mean_E, deviation_E = (torch.tensor(one).repeat(size // 3) for one in (MEAN, DEVIATION))
        self.register_buffer("scale_E", 1 / (255 * deviation_E), persistent=False)
        self.register_buffer("shift_E", -mean_E / deviation_E, persistent=False)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)
        for vector_D in (self.cls_D, self.mask_D):
            nn.init.normal_(vector_D, std=0.02)

    def features(self, tokens: Tokens) -> Float[Tensor, "N E"]:
        return torch.addcmul(self.shift_E, tokens["tubelet"].to(self.scale_E.dtype), self.scale_E)

    def embed(self, f_NE: Float[Tensor, "N E"], tokens: Tokens, replaced_N: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        x_ND = torch.where(replaced_N[:, None], self.mask_D, self.project(f_NE))
        x_ND = torch.where((tokens.special_N == CLS)[:, None], self.cls_D, x_ND)
        return x_ND + self.places(tokens)

    def restored(self, tokens: Tokens, f_NE: Float[Tensor, "N E"]) -> Tokens:
        """The tokens with the pixels that features say; special tokens show none."""
        byte_NE = ((f_NE.float() - self.shift_E) / self.scale_E).round().clamp(0, 255).to(torch.uint8)
        return tokens.with_values(tubelet=byte_NE.masked_fill((tokens.special_N >= 0)[:, None], 0))
