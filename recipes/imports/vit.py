"""ViT and ViTMAE's encoder as transformers saves them, and timm's vit_*, into recipes with an image role, and back.

Learned positions want `ImagePatches(..., places=LearnedGrid(...))`. Pixels are normalised in mmpre by ImageNet's mean
and deviation; where a model's own are known to be others, its patch projection is changed so that it gives the same.
The way back to transformers is recipes/exports/vit.py, by the same tables.
"""
# D model width, E = 3pp values of a patch, n patches of a picture

import re
from collections.abc import Mapping
from typing import Any

import timm as timm_models
import torch
from einops import rearrange
from torch import Tensor

from mmpre.exchange.imports import Foreign, ImportedError, Source
from mmpre.exchange.key_table import Table, linear, to_ours, under
from mmpre.modalities.image_patches import DEVIATION, MEAN
from mmpre.strict_json import read as read_json

PATCHES = {"cls": "embeddings.cls_token", "positions": "embeddings.position_embeddings",
           "project": "embeddings.patch_embeddings.projection"}  # fmt: skip
LAYER: Table = {
    **linear("0.norm", "layernorm_before"),
    **linear("0.sublayer.qkv", *(f"attention.attention.{name}" for name in ("query", "key", "value"))),
    **linear("0.sublayer.out", "attention.output.dense"),
    **linear("1.norm", "layernorm_after"),
    **linear("1.sublayer.up", "intermediate.dense"),
    **linear("1.sublayer.down", "output.dense"),
}
TIMM_PATCHES = {"cls": "cls_token", "positions": "pos_embed", "project": "patch_embed.proj"}
TIMM_LAYER: Table = {
    **linear("0.norm", "norm1"),
    **linear("0.sublayer.qkv", "attn.qkv"),
    **linear("0.sublayer.out", "attn.proj"),
    **linear("1.norm", "norm2"),
    **linear("1.sublayer.up", "mlp.fc1"),
    **linear("1.sublayer.down", "mlp.fc2"),
}


def layers(layer: Table, at: str, norm: str, depth: int) -> Table:
    """The table of an encoder, whose layers they call `at` and a number, and whose closing norm `norm`."""
    found = dict(linear("norm", norm))
    for i in range(depth):
        found |= under(f"blocks.{i}.sublayers.", f"{at}{i}.", layer)
    return found


def accepts(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in ("vit", "vit_mae") or str(config.get("architecture", "")).startswith("vit_")


def translate(source: Source) -> Foreign:
    config = source.config
    timm = "architecture" in config
    names, layer, inside, norm = (
        (TIMM_PATCHES, TIMM_LAYER, "blocks.", "norm") if timm else (PATCHES, LAYER, "encoder.layer.", "layernorm")
    )
    at = "vit." if f"vit.{names['cls']}" in source else ""
    if config.get("hidden_act", "gelu") != "gelu":
        raise ImportedError(f"{source.folder}: its activation is {config['hidden_act']}, ours gelu")
    depth = len({found[0] for name in source.places if (found := re.findall(rf"^{at}{inside}(\d+)\.", name))})
    foreign = Foreign(
        role="image",
        modality=_modality(source, at, names, *_pixels(source)),
        encoder=to_ours(layers(layer, f"{at}{inside}", f"{at}{norm}", depth), source.take),
        attention_heads=_heads(source) if timm else source.number("num_attention_heads"),
        eps=1e-6 if timm else config.get("layer_norm_eps", 1e-12),
        pre_norm=True,
    )
    source.expect_left("head.", "pooler.", "classifier.", "decoder.")
    return foreign


def _heads(source: Source) -> int:
    """timm does not always write the number down; its model of that name, without weights, tells.

    Nothing else of the file reaches timm, which would fetch or unpickle what it is told to.
    """
    config = source.config
    if (told := (config.get("model_args") or {}).get("num_heads")) is not None:
        return int(told)
    name = config.get("architecture")
    if not isinstance(name, str) or not re.fullmatch(r"vit_\w+", name):
        raise ImportedError(f"{source.folder}: wanted the name of one of timm's ViTs as architecture, got {name!r}")
    with torch.device("meta"):
        return timm_models.create_model(name, pretrained=False).blocks[0].attn.num_heads


def _pixels(source: Source) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that the model's pixels are normalised by; ours where it does not say."""
    told = source.config.get("pretrained_cfg", {})
    beside = source.folder / "preprocessor_config.json"
    if beside.exists():
        written = read_json(beside)
        told = {"mean": written.get("image_mean"), "std": written.get("image_std")}
    return tuple(told.get("mean") or MEAN), tuple(told.get("std") or DEVIATION)


def _modality(
    source: Source, at: str, names: Mapping[str, str], mean: tuple[float, ...], deviation: tuple[float, ...]
) -> dict[str, Tensor]:
    weight_DE = rearrange(source.take(f"{at}{names['project']}.weight"), "d c p q -> d (p q c)")
    bias_D = source.take(f"{at}{names['project']}.bias")
    repeat = weight_DE.shape[1] // 3
    theirs_E, ours_E, scale_E, own_E = (
        torch.tensor(one, dtype=torch.float64).repeat(repeat) for one in (mean, MEAN, deviation, DEVIATION)
    )
    # W ((x own + ours) - theirs) / scale + b, where x is a pixel as our modality normalises it
    bias_D = bias_D + (weight_DE.double() @ ((ours_E - theirs_E) / scale_E)).float()
    weight_DE = (weight_DE.double() * (own_E / scale_E)).float()
    place_nD = source.take(f"{at}{names['positions']}")[0]  # [CLS] first
    return {
        "project.weight": weight_DE,
        "project.bias": bias_D,
        "cls_D": source.take(f"{at}{names['cls']}").flatten() + place_nD[0],
        "places.table_PD": place_nD[1:],
    }
