"""Regions of a picture that a detector has found: features, boxes, soft class labels, and labels with a confidence.

Source: UNITER, Chen et al. 2019, arXiv:1909.11740, and LXMERT, Tan & Bansal 2019, arXiv:1908.07490 (`BoxedRegions`);
names and numbers as in the authors' code where a paper is silent.
"""
# N tokens of the packed batch, R regions of one picture, E values of a region's feature, C classes, D model width

from collections.abc import Mapping
from dataclasses import dataclass, field

import safetensors.torch
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw
from torch import Tensor, nn

from mmpre.data.sample import BadMember, Sample
from mmpre.draw import Draw
from mmpre.dropout import Dropout
from mmpre.show import GREY, HIDDEN, INK, PAPER, SIZE_PX, enlarged, font
from mmpre.tokens import Tokens

SLACK = 1e-2  # how far boxes may leave [0, 1] and a sum of soft labels 1: half precision and rounded pixels


@dataclass(frozen=True)
class RegionReader:
    """Reads a member with the named tensors features [R, E], boxes [R, 7] and, where `classes` is given, soft [R, C].

    A box is x1, y1, x2, y2, width, height, area, each as a share of the picture's. Soft labels sum to 1, class 0 is
    the background. The first `max_regions` are taken (detectors write the surest first). A picture whose tensors break
    this raises BadMember. `labels` names further tensors, such as {"object": 1600}: NAME [R], whole numbers below the
    one given, and NAME_confidence [R], how sure the detector was, 0 to 1.
    Fields: features (as stored), box, soft, NAME, NAME_confidence; there are no special tokens.
    """

    features: int
    classes: int | None = None
    suffixes: tuple[str, ...] = ("regions.safetensors",)
    max_regions: int = 100
    labels: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = {"features": self.features < 1, "max_regions": self.max_regions < 1}
        wrong["classes"] = self.classes is not None and self.classes < 2
        if any(wrong.values()):
            raise ValueError(
                "RegionReader: features and max_regions must be at least 1, classes at least 2 (background and one "
                f"more) or None, got features {self.features}, max_regions {self.max_regions}, classes {self.classes}"
            )

    def tokenize(self, sample: Sample, draw: Draw) -> Tokens:
        tensors = sample.tensors(self.suffixes)
        member = sample.bytes(self.suffixes)[0]
        widths = {"features": self.features, "boxes": 7} | ({"soft": self.classes} if self.classes else {})
        for name, width in widths.items():
            _check_tensor(tensors, name, width, member)
        taken = {name: tensors[name][: self.max_regions] for name in widths}
        fields = {"features": taken["features"], "box": taken["boxes"].float()}
        _check_boxes(fields["box"], member)
        if self.classes:
            fields["soft"] = taken["soft"].float()
            _check_soft(fields["soft"], member)
        for name, count in self.labels.items():
            label_R, sure_R = _labels(tensors, name, count, member)
            fields |= {name: label_R[: self.max_regions], f"{name}_confidence": sure_R[: self.max_regions]}
        return Tokens.of_row(torch.full((len(fields["box"]),), -1), **fields)

    def made(self) -> dict[str, bytes]:
        """As many regions as are taken, each the whole picture."""
        box_R7 = torch.tensor([0.0, 0, 1, 1, 1, 1, 1]).repeat(self.max_regions, 1)
        tensors = {"features": torch.zeros(self.max_regions, self.features), "boxes": box_R7}
        if self.classes:
            tensors["soft"] = torch.full((self.max_regions, self.classes), 1 / self.classes)
        for name in self.labels:
            tensors[name] = torch.zeros(self.max_regions, dtype=torch.int64)
            tensors[f"{name}_confidence"] = torch.ones(self.max_regions)
        return {self.suffixes[0]: safetensors.torch.save(tensors)}

    def show(self, tokens: Tokens, hidden_N: Bool[Tensor, "N"], sample: Sample | None = None) -> Image.Image:
        """The boxes, numbered, over the sample's picture where it has one; hidden ones are filled."""
        try:
            ground = enlarged(sample.image()) if sample else None
        except BadMember:
            ground = None
        ground = ground or Image.new("RGB", (320, 320), PAPER)
        scale = torch.tensor([ground.width - 1, ground.height - 1] * 2)
        boxes = (tokens["box"][:, :4].clamp(0, 1) * scale).round().int().tolist()
        pen = ImageDraw.Draw(ground)
        for number, (box, hidden) in enumerate(zip(boxes, hidden_N.tolist(), strict=True), 1):
            pen.rectangle(box, fill=(GREY,) * 3 if hidden else None, outline=HIDDEN if hidden else INK, width=2)
            pen.text((box[0] + 4, box[1] + 2), str(number), fill=HIDDEN if hidden else INK, font=font(SIZE_PX))
        return ground


def plain_reader(sample: Sample) -> RegionReader:
    """A reader for such regions as a sample holds, for `mmpre data inspect`."""
    tensors = sample.tensors(("regions.safetensors",))
    if "features" not in tensors or tensors["features"].ndim != 2:
        detail = f"no features [R, E] in it, only {sorted(tensors)[:8]}"
        raise BadMember("regions incomplete", "regions.safetensors", detail)
    soft = tensors.get("soft")
    return RegionReader(tensors["features"].shape[1], None if soft is None or soft.ndim != 2 else soft.shape[1])


def _check_tensor(tensors: dict[str, Tensor], name: str, width: int, member: str) -> None:
    if name not in tensors:
        detail = f"no tensor {name!r} in it, only {sorted(tensors)[:8]}"
        raise BadMember("regions incomplete", member, detail)
    value, regions = tensors[name], len(tensors["features"]) if tensors["features"].ndim else 0
    if tuple(value.shape) != (regions, width) or regions == 0:
        detail = f"{name} must be [regions, {width}] with regions >= 1 and as many as features, got {list(value.shape)}"
        raise BadMember("regions of another shape", member, detail)
    if not value.is_floating_point():
        raise BadMember("regions of another type", member, f"{name} must be floating point, got {value.dtype}")
    if not _finite(value):
        raise BadMember("regions not finite", member, f"{name} holds NaN or infinity")


EXPONENT = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80}  # all of whose bits are set in what is not finite


def _finite(value: Tensor) -> bool:
    """In half precision by the bits: on a CPU comparing takes many times as long."""
    if (bits := EXPONENT.get(value.dtype)) is None:
        return bool(value.isfinite().all())
    return not bool(((value.view(torch.int16) & bits) == bits).any())


def _check_boxes(boxes_R7: Float[Tensor, "R 7"], member: str) -> None:
    low, high = boxes_R7.aminmax()
    if low < -SLACK or high > 1 + SLACK:
        detail = f"boxes must be shares of the picture, 0 to 1, got {low:.3g} to {high:.3g}; divide by its size"
        raise BadMember("boxes out of range", member, detail)
    if (boxes_R7[:, 2:4] < boxes_R7[:, :2]).any():
        raise BadMember("boxes out of range", member, "a box ends before it begins; the order is x1, y1, x2, y2")


def _labels(tensors: dict[str, Tensor], name: str, count: int, member: str) -> tuple[Tensor, Tensor]:
    """A label and how sure it is, for each region."""
    sure = f"{name}_confidence"
    for one in (name, sure):
        if one not in tensors:
            raise BadMember("regions incomplete", member, f"no tensor {one!r} in it, only {sorted(tensors)[:8]}")
        if tuple(tensors[one].shape) != (len(tensors["features"]),):
            detail = f"{one} must be [regions], as many as features, got {list(tensors[one].shape)}"
            raise BadMember("regions of another shape", member, detail)
    label_R, sure_R = tensors[name], tensors[sure].float()
    if label_R.is_floating_point() or label_R.is_complex() or not 0 <= int(label_R.min()) <= int(label_R.max()) < count:
        got = f"{label_R.dtype}, {label_R.min()} to {label_R.max()}"
        detail = f"{name} must hold whole numbers from 0 to {count - 1}, got {got}"
        raise BadMember("labels out of range", member, detail)
    if not ((sure_R >= 0) & (sure_R <= 1 + SLACK)).all():  # NaN is not
        detail = f"{sure} must be 0 to 1, got {sure_R.min():.3g} to {sure_R.max():.3g}"
        raise BadMember("labels out of range", member, detail)
    return label_R.long(), sure_R


def _check_soft(soft_RC: Float[Tensor, "R C"], member: str) -> None:
    off = (soft_RC.sum(1) - 1).abs().max()
    if soft_RC.min() < 0 or off > SLACK:
        got = f"a least of {soft_RC.min():.3g} and a sum off by {off:.3g}"
        detail = f"soft labels must be probabilities that sum to 1, got {got}"
        raise BadMember("soft labels are no distribution", member, detail)


class Regions(nn.Module):
    """Dropout(LN(LN(W_v v + b_v) + LN(W_p p + b_p) + type 1)), where a replaced region's v is the mask vector.

    The mask stands for the feature, before the projection; the box of a hidden region stays visible. `types` is the
    text embedder's table. A head that predicts features may share `project`.
    """

    def __init__(
        self,
        reader: RegionReader,
        *,
        width: int,
        types: nn.Embedding,
        dropout: float = 0.1,
        eps: float = 1e-12,
    ) -> None:
        super().__init__()
        if types.num_embeddings < 2 or types.embedding_dim != width:
            raise ValueError(
                f"Regions: types must be a table of at least 2 vectors of width {width} (row 1 is for regions), got "
                f"{types.num_embeddings} of {types.embedding_dim}; share Text(..., types=2).types"
            )
        self.reader = reader
        self.types = types
        self.project = nn.Linear(reader.features, width)
        self.project_norm = nn.LayerNorm(width, eps=eps)
        self.place = nn.Linear(7, width)
        self.place_norm = nn.LayerNorm(width, eps=eps)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dropout = Dropout(dropout)
        # The authors keep a table of two, whose row 0 is pinned to zero: adding it to what stays visible is left out.
        self.mask_E = nn.Parameter(torch.empty(reader.features))
        for weight in (self.project.weight, self.place.weight, self.mask_E):
            nn.init.normal_(weight, std=0.02)
        for bias in (self.project.bias, self.place.bias):
            nn.init.zeros_(bias)

    def features(self, tokens: Tokens) -> Float[Tensor, "N E"]:
        return tokens["features"].to(self.mask_E.dtype)

    def embed(self, f_NE: Float[Tensor, "N E"], tokens: Tokens, replaced_N: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        shown_NE = torch.where(replaced_N[:, None], self.mask_E, f_NE)
        what_ND = self.project_norm(self.project(shown_NE))
        where_ND = self.place_norm(self.place(tokens["box"]))
        return self.dropout(self.norm(what_ND + where_ND + self.types.weight[1]))


class BoxedRegions(nn.Module):
    """Dropout((LN(W_f f) + LN(W_b b)) / 2), b the first four numbers of a box; a replaced region's f is zero.

    There is no type, no norm around both and no mask vector: a region whose feature was set to zero, or to another's,
    by a corruption is read as it stands (LXMERT).
    """

    def __init__(self, reader: RegionReader, *, width: int, dropout: float = 0.1, eps: float = 1e-12) -> None:
        super().__init__()
        self.reader = reader
        self.project = nn.Linear(reader.features, width)
        self.project_norm = nn.LayerNorm(width, eps=eps)
        self.place = nn.Linear(4, width)
        self.place_norm = nn.LayerNorm(width, eps=eps)
        self.dropout = Dropout(dropout)
        for layer in (self.project, self.place):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def features(self, tokens: Tokens) -> Float[Tensor, "N E"]:
        return tokens["features"].to(self.project.weight.dtype)

    def embed(self, f_NE: Float[Tensor, "N E"], tokens: Tokens, replaced_N: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        what_ND = self.project_norm(self.project(f_NE.masked_fill(replaced_N[:, None], 0)))
        where_ND = self.place_norm(self.place(tokens["box"][:, :4].to(what_ND.dtype)))
        return self.dropout((what_ND + where_ND) / 2)
