"""Image networks as transformers' ViTModel, with an image processor; of MAE, the encoder alone."""
# D model width, E = 3pp values of a patch, n patches of a picture, S side in pixels

from pathlib import Path

import numpy as np
import torch
import transformers
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from mmpre.draw import Draw
from mmpre.exchange.export import Check
from mmpre.exchange.key_table import to_theirs
from mmpre.modalities.image_patches import DEVIATION, MEAN, ImagePatches, LearnedGrid, SinCos, patches
from mmpre.network import Network
from mmpre.recipe import Recipe
from mmpre.recipes.exports.encoders import LIMIT, batch_of, differences, loaded, looks_elsewhere, numbers, quietly
from mmpre.recipes.imports.vit import LAYER, PATCHES, layers
from mmpre.sublayers.residual import PreNorm
from mmpre.tokens import Tokens

MADE_PX = 1024  # side of the made picture that tells how large the reader makes pictures


class ViT:
    target = "ViTModel of transformers"

    def differs(self, recipe: Recipe) -> list[str] | None:
        net = recipe.network
        if not isinstance(net, Network) or not any(isinstance(one, ImagePatches) for one in net.modalities.values()):
            return None
        if len(net.modalities) > 1:
            return [f"its rows hold {' and '.join(net.modalities)}, the class reads pictures alone"]
        told = differences(net.encoder, PreNorm)
        if type(image_of(net).places) not in (SinCos, LearnedGrid):
            told.append(f"its positions are {type(image_of(net).places).__name__}, the class has a table")
        return told + looks_elsewhere(recipe)

    def write(self, recipe: Recipe, folder: Path) -> list[str]:
        net, side = recipe.network, side_of(recipe)
        config = transformers.ViTConfig(**config_of(net, side), architectures=["ViTModel"], dtype="float32")
        config.save_pretrained(folder)
        save(tensors_of(net, side, ""), folder)
        return [write_processor(side, folder), "it has no pooler: ViTModel draws a new one, use last_hidden_state"]

    def check(self, recipe: Recipe, folder: Path) -> list[Check]:
        model = loaded(transformers.ViTModel, folder, add_pooling_layer=False)
        pixels, tokens = made_pictures(recipe, folder)
        ((role, _),) = recipe.network.modalities.items()
        ours_ND = recipe.network(batch_of(role, tokens))
        theirs_BnD = model(pixel_values=pixels).last_hidden_state
        size = f"{len(tokens)} made pictures of {pixels.shape[-1]} pixels a side"
        return [Check(f"states of {size}", float((ours_ND - theirs_BnD.flatten(0, 1)).abs().max()),
                      LIMIT * max(1.0, float(ours_ND.abs().max())))]  # fmt: skip


exporter = ViT()


def image_of(net: Network) -> ImagePatches:
    (image,) = net.modalities.values()
    return image


def side_of(recipe: Recipe) -> int:
    """Pixels a side of the squares that the network reads, in each direction alike."""
    image = image_of(recipe.network)
    if isinstance(image.places, LearnedGrid):
        if image.places.rows != image.places.columns:
            grid = f"{image.places.rows} x {image.places.columns} patches"
            raise ValueError(f"export: positions are for {grid}; ViTModel wants squares")
        return image.places.rows * image.reader.patch_px
    blank, transform = Image.new("RGB", (MADE_PX, MADE_PX)), image.reader.transform
    if transform is not None:
        with Draw.row(0, 0, 0, epoch=0, unit=0).seeding_torch("export"):
            blank = transform(blank)
    most = int(image.reader.max_patches**0.5)
    return max(1, min(round(min(blank.size) / image.reader.patch_px), most)) * image.reader.patch_px


def config_of(net: Network, side_px: int) -> dict[str, object]:
    sizes = numbers(net.encoder)
    return dict(
        hidden_size=sizes.width, num_hidden_layers=sizes.depth, num_attention_heads=sizes.heads,
        intermediate_size=sizes.hidden, hidden_act="gelu", hidden_dropout_prob=sizes.dropout,
        attention_probs_dropout_prob=sizes.attention_dropout, layer_norm_eps=sizes.eps, image_size=side_px,
        patch_size=image_of(net).reader.patch_px, num_channels=3, qkv_bias=True,
    )  # fmt: skip


def tensors_of(net: Network, side_px: int, at: str) -> dict[str, Tensor]:
    """The encoder's and the patches' tensors by the names of transformers."""
    image, depth = image_of(net), len(net.encoder.blocks)
    found = to_theirs(layers(LAYER, f"{at}encoder.layer.", f"{at}layernorm", depth), net.encoder.state_dict())
    place_nD = image.places(grid_tokens(side_px // image.reader.patch_px))  # [CLS] first, whose place is 0
    weight_DE = image.project.weight.detach()
    return found | {
        f"{at}{PATCHES['project']}.weight": rearrange(weight_DE, "d (p q c) -> d c p q", c=3, p=image.reader.patch_px),
        f"{at}{PATCHES['project']}.bias": image.project.bias.detach(),
        f"{at}{PATCHES['cls']}": image.cls_D.detach()[None, None],
        f"{at}{PATCHES['positions']}": place_nD.detach()[None],
    }


def grid_tokens(side: int) -> Tokens:
    """[CLS] and the places of a square of `side` patches, showing nothing."""
    position_n2 = torch.cartesian_prod(torch.arange(side), torch.arange(side)).int()
    special_N = torch.full((side**2 + 1,), -1)
    special_N[0] = 0
    return Tokens.of_row(special_N, position=nn.functional.pad(position_n2, (0, 0, 1, 0)))


def save(tensors: dict[str, Tensor], folder: Path) -> None:
    found = {name: tensor.float().contiguous().clone() for name, tensor in tensors.items()}
    save_file(found, folder / "model.safetensors", {"format": "pt"})


def write_processor(side_px: int, folder: Path) -> str:
    with quietly():
        transformers.ViTImageProcessor(
            size={"height": side_px, "width": side_px}, resample=Image.Resampling.BICUBIC, do_rescale=True,
            rescale_factor=1 / 255, do_normalize=True, image_mean=list(MEAN), image_std=list(DEVIATION),
        ).save_pretrained(folder)  # fmt: skip
    return (
        f"the image processor makes all pictures squares of {side_px} pixels; cut out the middle before, as mmpre does"
    )


def made_pictures(recipe: Recipe, folder: Path) -> tuple[Tensor, list[Tokens]]:
    """Two pictures of noise as the exported processor and as our reader make them."""
    image, side_px = image_of(recipe.network), side_of(recipe)
    rng = np.random.default_rng(0)
    made = [rng.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8) for _ in range(2)]
    with quietly():
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor([Image.fromarray(one) for one in made], return_tensors="pt")["pixel_values"]
    blank = grid_tokens(side_px // image.reader.patch_px)
    tokens = []
    for one in made:
        patch_nE = patches(torch.from_numpy(one), image.reader.patch_px)
        shown = {"patch": nn.functional.pad(patch_nE, (0, 0, 1, 0)), "position": blank["position"]}
        tokens.append(Tokens.of_row(blank.special_N, **shown))
    return pixels, tokens
