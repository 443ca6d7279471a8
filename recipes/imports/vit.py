"""ViT and ViTMAE's encoder as transformers saves them, and timm's vit_*, into recipes with an image role.

Learned positions want `ImagePatches(..., places=LearnedGrid(...))`. Pixels are normalised in mmpre by ImageNet's mean
and deviation; where a model's own are known to be others, its patch projection is changed so that it gives the same.
"""
# D model width, E = 3pp values of a patch, n patches of a picture

import re
from collections.abc import Mapping
from typing import Any

import timm as timm_models
import torch
from einops import rearrange
from torch import Tensor

from mmpre.imports import Foreign, ImportedError, Source
from mmpre.modalities.image_patches import DEVIATION, MEAN
from mmpre.strict_json import read as read_json

TRANSFORMERS = {
    "cls": "embeddings.cls_token", "positions": "embeddings.position_embeddings",
    "project": "embeddings.patch_embeddings.projection", "norm": "layernorm", "layer": "encoder.layer.",
    "first": "layernorm_before", "second": "layernorm_after", "out": "attention.output.dense",
    "up": "intermediate.dense", "down": "output.dense",
}  # fmt: skip
TIMM = {
    "cls": "cls_token", "positions": "pos_embed", "project": "patch_embed.proj", "norm": "norm", "layer": "blocks.",
    "first": "norm1", "second": "norm2", "out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2",
}  # fmt: skip


def accepts(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in ("vit", "vit_mae") or str(config.get("architecture", "")).startswith("vit_")


def translate(source: Source) -> Foreign:
    config = source.config
    timm = "architecture" in config
    names = TIMM if timm else TRANSFORMERS
    at = "vit." if f"vit.{names['cls']}" in source else ""
    if config.get("hidden_act", "gelu") != "gelu":
        raise ImportedError(f"{source.folder}: its activation is {config['hidden_act']}, ours gelu")
    depth = len({found[0] for name in source.places if (found := re.findall(rf"^{at}{names['layer']}(\d+)\.", name))})
    foreign = Foreign(
        role="image",
        modality=_modality(source, at, names, *_pixels(source)),
        encoder=_encoder(source, at, names, depth, timm=timm),
        attention_heads=_heads(config) if timm else config["num_attention_heads"],
        eps=1e-6 if timm else config.get("layer_norm_eps", 1e-12),
        pre_norm=True,
    )
    source.expect_left("head.", "pooler.", "classifier.", "decoder.")
    return foreign


def _heads(config: Mapping[str, Any]) -> int:
    """timm does not write the number down; its model without weights tells."""
    with torch.device("meta"):
        model = timm_models.create_model(config["architecture"], **config.get("model_args", {}))
    return model.blocks[0].attn.num_heads


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


def _encoder(source: Source, at: str, names: Mapping[str, str], depth: int, *, timm: bool) -> dict[str, Tensor]:
    found = {}
    for kind in ("weight", "bias"):
        found[f"norm.{kind}"] = source.take(f"{at}{names['norm']}.{kind}")
        for i in range(depth):
            layer, ours = f"{at}{names['layer']}{i}.", f"blocks.{i}.sublayers."
            if timm:
                qkv = source.take(f"{layer}attn.qkv.{kind}")
            else:
                parts = ("query", "key", "value")
                qkv = torch.cat([source.take(f"{layer}attention.attention.{one}.{kind}") for one in parts])
            found[f"{ours}0.sublayer.qkv.{kind}"] = qkv
            found[f"{ours}0.sublayer.out.{kind}"] = source.take(f"{layer}{names['out']}.{kind}")
            found[f"{ours}0.norm.{kind}"] = source.take(f"{layer}{names['first']}.{kind}")
            found[f"{ours}1.sublayer.up.{kind}"] = source.take(f"{layer}{names['up']}.{kind}")
            found[f"{ours}1.sublayer.down.{kind}"] = source.take(f"{layer}{names['down']}.{kind}")
            found[f"{ours}1.norm.{kind}"] = source.take(f"{layer}{names['second']}.{kind}")
    return found
