"""Clips as the result of a Video Swin transformer: a vector for 32 by 32 pixels of each frame, and one for each frame.

Source: Video Swin, Liu et al. 2021, arXiv:2106.13230, keeping every frame (a stride of 1 in time), and the vectors that
are added to its result, as in the authors' code of VIOLET, Fu et al. 2021, arXiv:2111.12681.
"""
# N tokens of the packed batch, b clips of T frames of h x w patches, p side of a patch in pixels, E = 3pp
# C channels of a level, V windows of a clip with n places each, A heads, D model width

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmpre.dropout import keep_like
from mmpre.modality import Reader
from mmpre.tokens import Tokens

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue, white being 1
PIXELS = 4  # side of what the lowest level has a vector for
Size = tuple[int, int, int]  # frames, rows, columns


class VideoSwin(nn.Module):
    """LayerNorm(Swin(clip) + place + time), and a learned vector in place of Swin's for the [CLS] of each frame.

    The reader must take one frame a token, squares of `grid` x `grid` patches, and give each frame a [CLS]: VideoReader
    with `frames=1, cls_each=True`. Its patches must be 4 pixels wide, times 2 for each level after the first. The width
    is `channels` times 2 for each level after the first. Replaced patches are black before anything reads them.
    Clips of equal length go through the transformer together, without padding in time. With `ordered` False each frame
    goes by itself, and all frames of a clip get their mean and no time: nothing then tells in which order they were.
    """

    def __init__(
        self, reader: Reader, *, grid: int, channels: int = 96, depths: Sequence[int] = (2, 2, 18, 2),
        heads: Sequence[int] = (3, 6, 12, 24), window: Size = (8, 7, 7), drop_path: float = 0.2, times: int = 6,
        places: int = 1 + 14**2, ordered: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.reader, self.grid, self.ordered = reader, grid, ordered
        self.patch_px = PIXELS * 2 ** (len(depths) - 1)
        if getattr(reader, "patch_px", self.patch_px) != self.patch_px or 1 + grid**2 > places:
            raise ValueError(
                f"VideoSwin: {len(depths)} levels read patches of {self.patch_px} pixels, and there are {places} "
                f"places for a [CLS] and the grid; got patches of {reader.patch_px} and a grid of {grid} x {grid}"
            )
        self.swin = Swin(grid * 2 ** (len(depths) - 1), channels, depths, heads, window, drop_path)
        width = self.swin.width
        self.cls_D = nn.Parameter(0.02 * torch.randn(width))
        self.place = nn.Embedding(places, width)
        self.time = nn.Embedding(times, width) if ordered else None
        self.norm = nn.LayerNorm(width)
        for table in (self.place, *([self.time] if ordered else [])):
            nn.init.normal_(table.weight, std=0.02)
        for name, one in (("mean_3", MEAN), ("deviation_3", DEVIATION)):
            self.register_buffer(name, torch.tensor(one), persistent=False)

    def features(self, tokens: Tokens) -> Float[Tensor, "N E"]:
        """Pixels, white being 1."""
        return tokens["tubelet"].to(self.mean_3.dtype) / 255

    def embed(self, f_NE: Float[Tensor, "N E"], tokens: Tokens, replaced_N: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        one = 1 + self.grid**2
        lengths = tokens.lengths_B.tolist()
        if any(length % one for length in lengths) or max(lengths, default=0) > one * self._most:
            raise ValueError(
                f"VideoSwin: wanted up to {self._most} frames of a [CLS] and {self.grid} x {self.grid} patches a row, "
                f"{one} tokens each, got rows of {sorted(set(lengths))} tokens; let the reader make squares of one size"
            )
        f_NE = f_NE.masked_fill(replaced_N[:, None], 0.0)  # black before it is normalised
        frame_FnE = f_NE.view(-1, one, f_NE.shape[1])[:, 1:]
        vector_FnD = self._in_order(frame_FnE, [length // one for length in lengths])
        cls_F1D = self.cls_D.to(vector_FnD.dtype).expand(len(vector_FnD), 1, -1)
        x_FND = torch.cat([cls_F1D, vector_FnD], 1) + self.place.weight[:one]
        if self.time is not None:
            x_FND = x_FND + self.time(tokens["position"][::one, 0])[:, None]
        return self.norm(x_FND.flatten(0, 1))

    def restored(self, tokens: Tokens, f_NE: Float[Tensor, "N E"]) -> Tokens:
        """The tokens with the pixels that features say."""
        return tokens.with_values(tubelet=(f_NE.float() * 255).round().clamp(0, 255).to(torch.uint8))

    @property
    def _most(self) -> int:
        return self.time.num_embeddings if self.time is not None else 1 << 30

    def _in_order(self, frame_FnE: Float[Tensor, "F n E"], times: Sequence[int]) -> Float[Tensor, "F n D"]:
        """The transformer's result for all frames, clips of equal length at a time."""
        p, grid = self.patch_px, self.grid
        clip_FHW3 = rearrange(frame_FnE, "f (h w) (p q c) -> f (h p) (w q) c", h=grid, w=grid, p=p, q=p)
        clip_FHW3 = (clip_FHW3 - self.mean_3) / self.deviation_3
        if not times:
            return frame_FnE.new_zeros(0, grid**2, self.swin.width)
        if not self.ordered:
            clip_FHW3, given, times = clip_FHW3, times, [1] * sum(times)
        starts = list(accumulate(times, initial=0))[:-1]
        order, found = [], []
        for length in sorted(set(times) - {0}):
            some = [start for start, time in zip(starts, times, strict=True) if time == length]
            index_F = (torch.tensor(some)[:, None] + torch.arange(length)).flatten().to(frame_FnE.device)
            y_bThwD = self.swin(clip_FHW3.index_select(0, index_F).unflatten(0, (-1, length)))
            order.append(index_F)
            found.append(y_bThwD.flatten(0, 1).flatten(1, 2))
        y_FnD = torch.cat(found) if found else frame_FnE.new_zeros(0, grid**2, self.swin.width)
        if len(found) > 1:
            y_FnD = torch.empty_like(y_FnD).index_copy(0, torch.cat(order), y_FnD)
        if not self.ordered:
            y_FnD = torch.cat([part.mean(0, keepdim=True).expand_as(part) for part in y_FnD.split(given)])
        return y_FnD


class Swin(nn.Module):
    """Levels of blocks with attention in windows of time, rows and columns; between levels 2 x 2 places become one.

    Takes frames as [b, T, side * 4, side * 4, 3] and gives [b, T, h, w, width]; `side` is the lowest level's grid. Each
    of its vectors stands for 4 x 4 pixels of a frame and of the next one, which is black after the last.
    """

    def __init__(
        self, side: int, channels: int, depths: Sequence[int], heads: Sequence[int], window: Size, drop_path: float
    ) -> None:
        super().__init__()
        if len(depths) != len(heads) or side % 2 ** (len(depths) - 1):
            raise ValueError(
                f"Swin: wanted heads for each level and a side that can be halved between them, got depths "
                f"{tuple(depths)}, heads {tuple(heads)} and side {side}"
            )
        self.project = nn.Linear(2 * 3 * PIXELS**2, channels)
        self.norm = nn.LayerNorm(channels)
        blocks, levels = sum(depths), []
        for i, (depth, count, first) in enumerate(zip(depths, heads, accumulate(depths, initial=0), strict=False)):
            share = [drop_path * block / max(1, blocks - 1) for block in range(first, first + depth)]
            levels.append(Level(side // 2**i, channels * 2**i, share, count, window))
        self.levels = nn.ModuleList(levels)
        self.merges = nn.ModuleList(Merge(level.width) for level in levels[:-1])
        self.width: int = levels[-1].width
        self.last = nn.LayerNorm(self.width)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, clip_bTHW3: Float[Tensor, "b T H W 3"]) -> Float[Tensor, "b T h w D"]:
        x_bThwE = rearrange(clip_bTHW3, "b t (h p) (w q) c -> b t h w (p q c)", p=PIXELS, q=PIXELS)
        next_bThwE = F.pad(x_bThwE[:, 1:], (0, 0, 0, 0, 0, 0, 0, 1))
        first_bThwC = self.project(torch.cat([x_bThwE, next_bThwE], -1))
        x_bThwC = self.norm(first_bThwC.to(clip_bTHW3.dtype))  # under autocast the states keep their precision
        for i, level in enumerate(self.levels):
            x_bThwC = level(x_bThwC)
            if i < len(self.merges):
                x_bThwC = self.merges[i](x_bThwC)
        return self.last(x_bThwC)


class Merge(nn.Module):
    """Four neighbouring places become one of twice the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * width)
        self.reduce = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x_bThwC: Float[Tensor, "b T h w C"]) -> Float[Tensor, "b T i j B"]:
        near_bTijA = self.norm(rearrange(x_bThwC, "b t (h r) (w s) c -> b t h w (s r c)", r=2, s=2))
        return self.reduce(near_bTijA).to(x_bThwC.dtype)


class Level(nn.Module):
    """Blocks of one width; every second one has its windows moved by half a window.

    A window is no larger than what it is laid over, and does not move along what it spans whole.
    """

    def __init__(self, side: int, width: int, drop_path: Sequence[float], heads: int, window: Size) -> None:
        super().__init__()
        self.width, self.window = width, (window[0], min(window[1], side), min(window[2], side))
        self.blocks = nn.ModuleList(Block(width, heads, window, self.window, share) for share in drop_path)

    def forward(self, x_bThwC: Float[Tensor, "b T h w C"]) -> Float[Tensor, "b T h w C"]:
        size: Size = tuple(x_bThwC.shape[1:4])
        window: Size = tuple(min(pair) for pair in zip(self.window, size, strict=True))
        shift: Size = tuple(0 if w == s else w // 2 for w, s in zip(window, size, strict=True))
        apart = apart_Vnn(size, window, shift, x_bThwC.device) if any(shift) else None
        for i, block in enumerate(self.blocks):
            moved = i % 2 == 1 and any(shift)
            x_bThwC = block(x_bThwC, window, shift if moved else (0, 0, 0), apart if moved else None)
        return x_bThwC


class Block(nn.Module):
    """Attention within windows, then a feed-forward, both after a norm, and left out of a share of clips in training.

    `table` has a number a head for each distance in a window of the `largest` size; `window` is the real one.
    """

    def __init__(self, width: int, heads: int, largest: Size, window: Size, drop_path: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"Swin: a level's width must be a multiple of its heads, got {width} and {heads}")
        self.heads, self.drop_path = heads, drop_path
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.table_RA = nn.Parameter(torch.empty(math.prod(2 * side - 1 for side in largest), heads))
        nn.init.trunc_normal_(self.table_RA, std=0.02)
        self.register_buffer("row_nn", distance_rows(window, largest), persistent=False)

    def forward(
        self, x_bThwC: Float[Tensor, "b T h w C"], window: Size, shift: Size, apart_Vnn: Bool[Tensor, "V n n"] | None
    ) -> Float[Tensor, "b T h w C"]:
        x_bThwC = x_bThwC + self._kept(self._attend(self.norm_attention(x_bThwC), window, shift, apart_Vnn))
        return x_bThwC + self._kept(self.down(F.gelu(self.up(self.norm_mlp(x_bThwC)))))

    def _attend(
        self, x_bThwC: Float[Tensor, "b T h w C"], window: Size, shift: Size, apart_Vnn: Bool[Tensor, "V n n"] | None
    ) -> Float[Tensor, "b T h w C"]:
        size = x_bThwC.shape[1:4]
        after = [-s % w for s, w in zip(size, window, strict=True)]  # zeros that fill the last windows
        if any(after):
            x_bThwC = F.pad(x_bThwC, (0, 0, 0, after[2], 0, after[1], 0, after[0]))
        if any(shift):
            x_bThwC = x_bThwC.roll([-s for s in shift], (1, 2, 3))
        count = [s // w for s, w in zip(x_bThwC.shape[1:4], window, strict=True)]
        parts = dict(zip("ijkthw", (*count, *window), strict=True))
        qkv = rearrange(
            self.qkv(x_bThwC), "b (i t) (j h) (k w) (x a c) -> x b (i j k a) (t h w) c", x=3, a=self.heads, **parts
        )
        n = math.prod(window)
        bias_Ann = self.table_RA[self.row_nn[:n, :n]].movedim(-1, 0)  # a shorter window in time comes first
        bias_VAnn = bias_Ann.expand(math.prod(count), -1, -1, -1)
        if apart_Vnn is not None:
            bias_VAnn = bias_VAnn.masked_fill(apart_Vnn[:, None], -torch.inf)
        # a clip's windows are taken for heads: all clips then share one bias
        y_bXnc = F.scaled_dot_product_attention(*qkv, attn_mask=bias_VAnn.flatten(0, 1).to(qkv.dtype))
        y_bThwC = rearrange(y_bXnc, "b (i j k a) (t h w) c -> b (i t) (j h) (k w) (a c)", a=self.heads, **parts)
        if any(shift):
            y_bThwC = y_bThwC.roll(shift, (1, 2, 3))
        return self.out(y_bThwC[:, : size[0], : size[1], : size[2]])

    def _kept(self, y_bThwC: Float[Tensor, "b T h w C"]) -> Float[Tensor, "b T h w C"]:
        if not self.training or not self.drop_path:
            return y_bThwC
        keep_b, up = keep_like(y_bThwC.new_empty(len(y_bThwC)), self.drop_path)
        return y_bThwC * (keep_b * up).view(-1, 1, 1, 1, 1)


def distance_rows(window: Size, largest: Size) -> Int[Tensor, "n n"]:
    """For each pair of places in a window, the row of a table that has one for each distance in the largest window.

    The index of the largest window, cut to fewer places, would be right only where no more than time is shorter.
    """
    place_n3 = torch.cartesian_prod(*(torch.arange(side) for side in window))
    row_nn, offset = torch.zeros(len(place_n3), len(place_n3), dtype=torch.int64), place_n3[:, None] - place_n3
    for axis, side in enumerate(largest):
        row_nn = row_nn * (2 * side - 1) + offset[..., axis] + side - 1
    return row_nn


def apart_Vnn(size: Size, window: Size, shift: Size, device: torch.device) -> Bool[Tensor, "V n n"]:
    """True for two places that moved windows bring together though they lie at opposite ends of the clip."""
    full = [math.ceil(s / w) * w for s, w in zip(size, window, strict=True)]
    part_THW = torch.zeros(1, dtype=torch.int64, device=device)
    for length, side, moved in zip(full, window, shift, strict=True):
        place = torch.arange(length, device=device)
        part = (place >= length - side).long() + (place >= length - moved).long() if moved else place * 0
        part_THW = part_THW[..., None] * 3 + part
    part_THW = part_THW[0]
    t, h, w = window
    part_Vn = rearrange(part_THW, "(i t) (j h) (k w) -> (i j k) (t h w)", t=t, h=h, w=w)
    return part_Vn[:, :, None] != part_Vn[:, None]
