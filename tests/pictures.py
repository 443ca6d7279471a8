"""Small pictures made for tests, and weights of transformers' ViTMAE in ours."""

import io

import numpy as np
import torch
from PIL import Image
from torch import nn

from mmpre.blocks import Encoder
from mmpre.data.sample import Sample
from mmpre.objectives.autoencode import Autoencode


def encoded(pixels_HW3: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3.astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def sample(pixels_HW3: np.ndarray, key: str = "a", **more: bytes) -> Sample:
    return Sample(key, "shard", "digest", {"png": encoded(pixels_HW3)} | more)


def noise(height_px: int, width_px: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3))


def waves(height_px: int, width_px: int, seed: int = 0) -> np.ndarray:
    """One wave across the picture in two colours: what is hidden can be told from what is not."""
    rng = np.random.default_rng(seed)
    angle, phase, colours = rng.uniform(0, np.pi), rng.uniform(0, 6), rng.integers(0, 256, (2, 3))
    y, x = np.mgrid[:height_px, :width_px]
    share = 0.5 + 0.5 * np.sin((x * np.cos(angle) + y * np.sin(angle)) * 0.35 + phase)
    return colours[0] * share[..., None] + colours[1] * (1 - share[..., None])


@torch.no_grad()
def copy_mae(objective: Autoencode, theirs: nn.Module) -> None:
    """Copy every weight of a ViTMAEForPreTraining; its fixed positions are not looked at."""
    image = objective.net.modalities["image"]
    convolution = theirs.vit.embeddings.patch_embeddings.projection
    image.project.weight.copy_(convolution.weight.permute(0, 2, 3, 1).flatten(1))
    image.project.bias.copy_(convolution.bias)
    image.cls_D.copy_(theirs.vit.embeddings.cls_token.flatten())
    copy_layers(objective.net.encoder, theirs.vit.layers, theirs.vit.layernorm)
    copy_layers(objective.decoder, theirs.decoder.decoder_layers, theirs.decoder.decoder_norm)
    objective.narrow.load_state_dict(theirs.decoder.decoder_embed.state_dict())
    objective.missing_W.copy_(theirs.decoder.mask_token.flatten())
    objective.head.project.load_state_dict(theirs.decoder.decoder_pred.state_dict())


@torch.no_grad()
def copy_layers(encoder: Encoder, layers: nn.ModuleList, norm: nn.Module) -> None:
    for block, layer in zip(encoder.blocks, layers, strict=True):
        attention, feed_forward = block.sublayers
        parts = [getattr(layer.attention, f"{name}_proj") for name in "qkv"]
        attention.sublayer.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
        attention.sublayer.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
        pairs = [
            (attention.sublayer.out, layer.attention.o_proj), (attention.norm, layer.layernorm_before),
            (feed_forward.sublayer.up, layer.mlp.fc1), (feed_forward.sublayer.down, layer.mlp.fc2),
            (feed_forward.norm, layer.layernorm_after),
        ]  # fmt: skip
        for ours, source in pairs:
            ours.load_state_dict(source.state_dict())
    encoder.norm.load_state_dict(norm.state_dict())
