"""Pictures as regions: what a frozen network makes of each box, or of the cells of a grid where there are no boxes.

    # regions.py, for: mmpre data derive SHARDS --out regions --by regions.py --suffix regions.safetensors
    from mmpre.region_features import RegionFeatures
    derive = RegionFeatures("tf_efficientnet_lite0", weights="lite0.safetensors", grid=4)

UNITER's features (Chen et al. 2019, arXiv:1909.11740) come from a detector; where there is none, cells of a grid stand
for regions, as in Pixel-BERT (Huang et al. 2020, arXiv:2004.00849).
"""
# R regions of a picture, n of several, E values of a feature, s side of a crop in pixels

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from jaxtyping import Float16, Float32, UInt8
from PIL import Image
from torch import Tensor, nn

from mmpre.data.sample import IMAGE_FORMATS, BadMember, Sample
from mmpre.processes.processes import Processes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, white being 1
SLACK_PX = 1.0  # how far a detector's box may leave the picture
PASS = 256  # crops that go through the network at once
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels


class RegionFeatures:
    """Makes, of each sample's picture, features [R, E] (float16) and boxes [R, 7], as `RegionReader` reads them.

    `network` is a module that makes crops [n, 3, s, s] into [n, E], or the name of a model of timm, with `weights` of a
    safetensors file or, without, as drawn from `seed`. It is frozen and in evaluation mode, so a region's feature does
    not depend on which others go through it; pixels are scaled by the mean and deviation that it names (`scaling`).
    `boxes(sample, width, height)` gives boxes in pixels, None where there are none (by default those of the member
    `json`, see `json_boxes`); then, or where `boxes` is None, the `grid` x `grid` cells of the picture are taken, row
    after row, or, for a grid of 0, the sample is left out.
    A picture or a box that cannot be used raises BadMember.
    """

    def __init__(
        self,
        network: nn.Module | str,
        *,
        weights: Path | str | None = None,
        seed: int = 0,
        boxes: "Callable[[Sample, int, int], Sequence[Box] | None] | None" = None,
        grid: int = 4,
        side_px: int = 80,
        suffixes: Sequence[str] = tuple(IMAGE_FORMATS),
    ) -> None:
        if grid < 0 or side_px < 1:
            raise ValueError(f"RegionFeatures: grid must not be negative, side_px at least 1, got {grid} and {side_px}")
        self.boxes, self.grid, self.side_px, self.suffixes = boxes or json_boxes, grid, side_px, tuple(suffixes)
        self.device = Processes.device_here()
        module = _timm(network, weights, seed) if isinstance(network, str) else network
        self.network = module.to(self.device).eval().requires_grad_(False)

    @property
    def about(self) -> str:
        """What the features depend on."""
        digest = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        named = scaling(self.network)
        scaled = "" if named == (MEAN, STD) else f", mean {named[0]}, std {named[1]}"
        return f"{type(self.network).__name__} {digest.hexdigest()}, grid {self.grid}, side {self.side_px}{scaled}"

    def __call__(self, samples: Sequence[Sample]) -> list[Mapping[str, Tensor]]:
        crops, boxes = [], []
        for sample in samples:
            picture = sample.image(self.suffixes)
            found = self._boxes(sample, picture)
            crops.append(cut(picture, found, self.side_px))
            boxes.append(shares(found, *picture.size))
        feature_nE = torch.cat([describe(self.network, part.to(self.device)) for part in torch.cat(crops).split(PASS)])
        features = feature_nE.cpu().split([len(one) for one in boxes])
        return [{"features": f_RE, "boxes": box_R7} for f_RE, box_R7 in zip(features, boxes, strict=True)]

    def _boxes(self, sample: Sample, picture: Image.Image) -> Sequence[Box]:
        width, height = picture.size
        found = self.boxes(sample, width, height)
        if found is None or not len(found):
            if not self.grid:
                raise BadMember("no boxes", "json", "there is no box in it; give a grid, or leave the sample out")
            return cells(width, height, self.grid)
        return [_within(box, width, height) for box in found]


def _within(box: Box, width: int, height: int) -> Box:
    x1, y1, x2, y2 = box
    inside = -SLACK_PX <= x1 < x2 <= width + SLACK_PX and -SLACK_PX <= y1 < y2 <= height + SLACK_PX
    clipped = max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)
    if not inside or clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        detail = f"{x1:g}, {y1:g}, {x2:g}, {y2:g} does not lie in a picture of {width} x {height}"
        raise BadMember("boxes out of range", "json", f"{detail}; the order is x1, y1, x2, y2, in pixels")
    return clipped


def json_boxes(sample: Sample, width: int, height: int) -> Sequence[Box] | None:
    """Boxes of the member `json`, of a form like {"regions": [{"box": [x1, y1, x2, y2]}, ...]}, in pixels."""
    if "json" not in sample.members:
        return None
    told = sample.json()
    regions = told.get("regions") if isinstance(told, dict) else None
    if not regions:
        return None
    try:
        boxes = [tuple(float(side) for side in region["box"]) for region in regions]
        if any(len(box) != 4 for box in boxes):
            raise ValueError
    except (TypeError, KeyError, ValueError):
        detail = f'wanted "regions": [{{"box": [x1, y1, x2, y2]}}, ...], got {json.dumps(regions)[:80]}'
        raise BadMember("boxes of another form", "json", detail) from None
    return boxes


def cells(width: int, height: int, grid: int) -> list[Box]:
    """The cells of a grid that cover a picture, each at least a pixel wide, row after row."""
    columns, rows = (min(grid, side) for side in (width, height))
    x, y = ([side * i // count for i in range(count + 1)] for side, count in ((width, columns), (height, rows)))
    return [(x[j], y[i], x[j + 1], y[i + 1]) for i in range(rows) for j in range(columns)]


def cut(picture: Image.Image, boxes: Sequence[Box], side_px: int) -> UInt8[Tensor, "R 3 s s"]:
    """Each box as it stands in the picture, with what else is in it, stretched to a square."""
    size = (side_px, side_px)
    # cut first: resize(box=...) would blend in what lies round the box
    crops = [picture.crop(_whole(box)).resize(size, Image.Resampling.BILINEAR) for box in boxes]
    return torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2)


def _whole(box: Box) -> tuple[int, int, int, int]:
    """Whole pixels, at least one in each direction."""
    x1, y1 = int(box[0]), int(box[1])
    return x1, y1, max(x1 + 1, round(box[2])), max(y1 + 1, round(box[3]))


def describe(network: nn.Module, crops_R3ss: UInt8[Tensor, "R 3 s s"]) -> Float16[Tensor, "R E"]:
    mean, std = (torch.tensor(values, device=crops_R3ss.device)[:, None, None] for values in scaling(network))
    with torch.inference_mode():
        return network(((crops_R3ss / 255 - mean) / std).contiguous(memory_format=torch.channels_last)).half()


def scaling(network: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and deviation of pixels that a network of timm names in its `pretrained_cfg`; ImageNet's of others."""
    named = getattr(network, "pretrained_cfg", {})
    return tuple(named.get("mean", MEAN)), tuple(named.get("std", STD))


def shares(boxes: Sequence[Box], width: int, height: int) -> Float32[Tensor, "R 7"]:
    """Boxes in pixels as UNITER's seven shares: x1, y1, x2, y2, width, height, area."""
    box_R4 = torch.tensor(boxes, dtype=torch.float64) / torch.tensor([width, height, width, height])
    x1, y1, x2, y2 = box_R4.T
    return torch.stack([x1, y1, x2, y2, x2 - x1, y2 - y1, (x2 - x1) * (y2 - y1)], dim=1).float()


def _timm(name: str, weights: Path | str | None, seed: int) -> nn.Module:
    import timm  # takes seconds

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model(name, pretrained=False, num_classes=0)
    if weights is not None:
        given = safetensors.torch.load_file(weights)
        missing, unknown = network.load_state_dict(given, strict=False)
        if missing or any(not key.startswith(("classifier", "head", "fc")) for key in unknown):
            raise ValueError(
                f"RegionFeatures: {weights} does not fit {name}: {len(missing)} of its tensors are missing "
                f"({', '.join(missing[:3])}), {len(unknown)} are unknown ({', '.join(unknown[:3])})"
            )
    return network
