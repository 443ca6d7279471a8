"""MAE's encoder and decoder as transformers' ViTMAEForPreTraining, with an image processor."""
# B pictures, n patches of a picture, M hidden patches, E = 3pp values of a patch

from pathlib import Path

import torch
import transformers
from torch import Tensor

from mmpre.attention import Full
from mmpre.batch import Picked, Row, pack
from mmpre.draw import Draw
from mmpre.exchange.export import Check
from mmpre.exchange.imports import Source
from mmpre.exchange.key_table import Table, linear, to_ours, to_theirs, under
from mmpre.heads.pixels import Pixels
from mmpre.masking.drop import Drop
from mmpre.masking.exact import ExactShare
from mmpre.modalities.image_patches import SinCos
from mmpre.objectives.autoencode import Autoencode
from mmpre.recipe import Recipe, Task
from mmpre.recipes.exports.encoders import LIMIT, differences, loaded, numbers
from mmpre.recipes.exports.vit import (
    ViT,
    config_of,
    grid_tokens,
    made_pictures,
    save,
    side_of,
    tensors_of,
    write_processor,
)
from mmpre.recipes.imports.vit import LAYER, layers
from mmpre.sublayers.residual import PreNorm
from mmpre.tokens import Tokens

OUTER: Table = {
    **linear("narrow", "decoder.decoder_embed"),
    **linear("head.project", "decoder.decoder_pred"),
}


class ViTMAE(ViT):
    target = "ViTMAEForPreTraining of transformers"

    def differs(self, recipe: Recipe) -> list[str] | None:
        told = super().differs(recipe)
        if told is None:
            return None
        found = _tasks(recipe)
        if len(found) != 1:
            return [*told, f"{len(found)} of its tasks decode what was dropped, the class has one decoder"]
        objective = found[0].objective
        decoder = differences(objective.decoder, PreNorm)
        told += [f"its decoder: {one}" for one in decoder]
        if not isinstance(objective.head, Pixels) or not isinstance(objective.places, SinCos):
            told.append("its decoder has other positions, or predicts something other than pixels")
        if not decoder and not told and numbers(objective.decoder).eps != numbers(recipe.network.encoder).eps:
            told.append("its decoder's norms have another eps")
        return told

    def write(self, recipe: Recipe, folder: Path) -> list[str]:
        (task,), side = _tasks(recipe), side_of(recipe)
        objective, sizes = task.objective, numbers(task.objective.decoder)
        config = transformers.ViTMAEConfig(
            **config_of(recipe.network, side), decoder_hidden_size=sizes.width, decoder_num_hidden_layers=sizes.depth,
            decoder_num_attention_heads=sizes.heads, decoder_intermediate_size=sizes.hidden,
            norm_pix_loss=objective.head.normalise, mask_ratio=_share(task),
            architectures=["ViTMAEForPreTraining"], dtype="float32",
        )  # fmt: skip
        config.save_pretrained(folder)
        place_nW = objective.places(grid_tokens(side // config.patch_size))
        save(
            tensors_of(recipe.network, side, "vit.")
            | to_theirs(_decoder(sizes.depth), objective.state_dict())
            | {
                "decoder.mask_token": objective.missing_W.detach()[None, None],
                "decoder.decoder_pos_embed": place_nW[None],
            },
            folder,
        )
        note = "ViTMAEModel hides patches in use as well; for features export to vit, or set mask_ratio to 0"
        return [write_processor(side, folder), note]

    def check(self, recipe: Recipe, folder: Path) -> list[Check]:
        (task,), model = _tasks(recipe), loaded(transformers.ViTMAEForPreTraining, folder)
        objective, source = task.objective, Source(folder)
        own, back = objective.state_dict(), to_ours(_decoder(len(objective.decoder.blocks)), source.take)
        back |= {"missing_W": source.take("decoder.mask_token").flatten()}
        worst = max(float((own[name] - tensor).abs().max()) for name, tensor in back.items())
        pixels, tokens = made_pictures(recipe, folder)
        rows, hidden_Bn = _hidden(task, tokens)
        batch = pack(rows, Full().plan)
        picked_ME = objective.head.predict(objective.states(batch))
        theirs = model(pixel_values=pixels, noise=hidden_Bn.float())
        theirs_ME = theirs.logits[hidden_Bn]
        loss = float(objective(batch, Draw.row(0, 0, 0, epoch=0, unit=0)).terms[0].sum) / len(picked_ME)
        return [
            Check("tensors of the decoder", worst, 0.0),
            Check(f"predicted pixels of {len(picked_ME)} hidden patches", float((picked_ME - theirs_ME).abs().max()),
                  LIMIT * max(1.0, float(picked_ME.abs().max()))),
            Check("loss", abs(loss - float(theirs.loss)), LIMIT * max(1.0, abs(loss))),
        ]  # fmt: skip


exporter = ViTMAE()


def _tasks(recipe: Recipe) -> list[Task]:
    return [task for task in recipe.stages[-1].tasks if type(task.objective) is Autoencode]


def _share(task: Task) -> float:
    """The share that the task hides; the class's own where it has no single one."""
    mask = getattr(task.view, "picks", {}).get(task.objective.pick)
    return mask.share if isinstance(mask, ExactShare) and isinstance(mask.share, float) else 0.75


def _decoder(depth: int) -> Table:
    """The decoder's table, but for the two tensors that have another shape there."""
    return {**OUTER, **under("decoder.", "decoder.", layers(LAYER, "decoder_encoder.layer.", "decoder_norm", depth))}


def _hidden(task: Task, tokens: list[Tokens]) -> tuple[list[Row], Tensor]:
    """Rows as the task's view makes them, as many patches hidden as the class hides, and which: True means hidden."""
    count = len(tokens[0]) - 1
    kept = int(count * (1 - _share(task)))  # as ViTMAE rounds
    g = torch.Generator().manual_seed(0)
    rows, hidden = [], torch.zeros(len(tokens), count, dtype=torch.bool)
    role = next(iter(task.objective.readers))
    for i, one in enumerate(tokens):
        index_M = 1 + torch.randperm(count, generator=g)[kept:].sort().values
        hidden[i, index_M - 1] = True
        made = Drop()(one, index_M, Draw.row(0, 0, 0, epoch=0, unit=i))
        rows.append(_row(str(i), role, task.objective.pick, one, made, index_M))
    return rows, hidden


def _row(key: str, role: str, pick: str, clean: Tokens, made: object, index_M: Tensor) -> Row:
    picked = Picked(role, index_M, made.index_map[index_M])
    return Row(key, {role: clean}, {role: made.tokens}, {role: made.replaced_N}, {pick: picked})
