"""MAE against transformers' ViTMAEForPreTraining, on pictures of several shapes, and learning."""

import numpy as np
import pytest
import torch
import transformers
from pictures import copy_mae, noise, sample, waves

from mmpre.batch import pack
from mmpre.draw import Draw
from mmpre.heads.pixels import Pixels
from mmpre.masking.drop import Drop
from mmpre.masking.exact import ExactShare
from mmpre.recipes.mae import mae, scales
from mmpre.view import View

DRAW = Draw.micro_batch(0, 0, 0, 0)
SMALL = dict(
    width=32, depth=2, heads=4, decoder_width=16, decoder_depth=2, decoder_heads=2, patch_px=8, side_px=0, batch=8,
    micro_batches=1, steps=10, warmup=1,
)  # fmt: skip


def some_objective(**numbers):
    torch.manual_seed(0)
    return mae(**SMALL | numbers).stages[0].tasks[0]


def some_batch(task, pictures, first=0):
    rows = [
        task.view.row(sample(p, str(i)), task.objective.readers, Draw.row(0, 0, 0, epoch=0, unit=first + i), None)
        for i, p in enumerate(pictures)
    ]
    return pack(rows, task.view.attend.plan)


@pytest.fixture
def theirs():
    torch.manual_seed(1)
    config = transformers.ViTMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8,
        decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
        decoder_intermediate_size=64, layer_norm_eps=1e-6, mask_ratio=0.75, norm_pix_loss=True,
        hidden_act="gelu",
    )  # fmt: skip
    model = transformers.ViTMAEForPreTraining(config)
    model.vit.embeddings.patch_embeddings.projection._is_hf_initialized = False  # or it leaves its positions at 0
    model.vit.embeddings.initialize_weights()
    model.decoder.initialize_weights(16)
    assert model.vit.embeddings.position_embeddings.any() and model.decoder.decoder_pos_embed.any()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" not in name and "pos_embed" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def their_loss(model, batch):
    """Their loss on our batch: pictures put together from our normalised patches, the same patches hidden."""
    tokens = batch.clean["image"]
    keep_N = torch.ones(len(tokens), dtype=torch.bool)
    keep_N[batch.picked["patch"].clean_M] = False
    rows = len(batch.keys)
    hidden = (~keep_N).view(rows, 17)[:, 1:]
    patch_BnE = some_objective().objective.net.modalities["image"].double().features(tokens)
    patch_BnE = patch_BnE.view(rows, 17, -1)[:, 1:]
    pictures = patch_BnE.view(rows, 4, 4, 8, 8, 3).permute(0, 5, 1, 3, 2, 4).reshape(rows, 3, 32, 32)
    return model(pictures, noise=hidden.float()).loss


def test_loss_and_every_gradient_equal_those_of_transformers(theirs):
    task, theirs = some_objective(), theirs.double()
    copy_mae(task.objective, theirs)
    task.objective.double()  # gradients that cancel out are compared too
    batch = some_batch(task, [noise(32, 32, seed) for seed in range(5)])
    assert batch.counts["picked:patch"] == 5 * 12
    ours, expected = task.objective(batch, DRAW).total(batch.counts), their_loss(theirs, batch)
    torch.testing.assert_close(ours, expected.float(), atol=1e-5, rtol=1e-5)
    ours.backward()
    expected.backward()
    for parameter in theirs.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    filled = some_objective()
    copy_mae(filled.objective, theirs)
    compared = 0
    pairs = zip(task.objective.named_parameters(), filled.objective.named_parameters(), strict=True)
    for (name, parameter), (_, grad) in pairs:
        if name.endswith("mask_D"):  # patches are dropped: no gradient
            assert parameter.grad is None or not parameter.grad.any()
            continue
        assert grad.abs().sum() > 0, name
        off = (parameter.grad - grad).abs().max() / grad.abs().max()
        assert off < 1e-3, f"{name}: off by {off:.1e} of its largest value"
        compared += 1
    assert compared > 50


def test_a_batch_of_ragged_pictures_equals_each_alone():
    task = some_objective()
    shapes = [(32, 32), (16, 64), (40, 24), (8, 8), (24, 40)]
    pictures = [noise(*shape, seed) for seed, shape in enumerate(shapes)]
    together = some_batch(task, pictures)
    loss = task.objective(together, DRAW)
    alone = 0.0
    for i, shown in enumerate(pictures):
        alone += task.objective(some_batch(task, [shown], first=i), DRAW).terms[0].sum.item()
    assert loss.terms[0].sum.item() == pytest.approx(alone, rel=1e-5)


def test_what_is_dropped_does_not_reach_the_states():
    task = some_objective()
    first = some_batch(task, [noise(32, 32)])
    hidden = first.picked["patch"].clean_M - 1  # [CLS] is no patch
    other = noise(32, 32)
    for patch in hidden.tolist():
        row, column = divmod(patch, 4)
        other[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = (
            255 - other[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        )
    second = some_batch(task, [other])
    assert not torch.equal(first.clean["image"]["patch"], second.clean["image"]["patch"])
    assert torch.equal(task.objective.states(first), task.objective.states(second))


def test_raw_pixels_are_predicted_where_the_recipe_says_so():
    tokens = some_batch(some_objective(), [noise(16, 16)]).clean["image"]
    image = some_objective().objective.net.modalities["image"]
    index_M = torch.arange(1, 5)
    raw, _ = Pixels(16, 192, image.features, normalise=False).target(tokens, index_M)
    torch.testing.assert_close(raw, image.features(tokens)[1:])
    normal, flat = Pixels(16, 192, image.features).target(tokens, index_M)
    torch.testing.assert_close(normal.mean(1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat, torch.full((4,), 191 / 192), atol=1e-3, rtol=0)


@pytest.mark.parametrize(("scale", "sizes"), [("base", (768, 12, 12, 16)), ("large", (1024, 24, 16, 16))])
def test_the_papers_scales_have_the_parameters_of_the_public_models(scale, sizes):
    width, depth, heads, patch = sizes
    with torch.device("meta"):
        config = transformers.ViTMAEConfig(
            hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads, intermediate_size=4 * width,
            patch_size=patch,
        )  # fmt: skip
        theirs = transformers.ViTMAEForPreTraining(config)
        ours = mae(**scales[scale]).module()
    fixed = sum(p.numel() for n, p in theirs.named_parameters() if "position" in n or "pos_embed" in n)
    assert sum(p.numel() for p in ours.parameters()) - width == sum(p.numel() for p in theirs.parameters()) - fixed


def test_the_tiny_network_learns_what_is_hidden():
    recipe = mae(**scales["tiny"] | dict(width=48, depth=2, heads=2, decoder_width=32, decoder_depth=1, side_px=0))
    objective = recipe.stages[0].tasks[0].objective
    view = View(picks={"patch": ExactShare(role="image", share=0.75)}, corruption=Drop())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3)

    def batch(first):
        pictures = [waves(48, 48, seed) for seed in range(first, first + 16)]
        rows = [
            view.row(sample(p, str(i)), objective.readers, Draw.row(0, 0, 0, epoch=first, unit=i), None)
            for i, p in enumerate(pictures)
        ]
        return pack(rows, view.attend.plan)

    def error(first):
        made = batch(first)
        with torch.no_grad():
            return objective(made, DRAW).total(made.counts).item()

    untrained = error(100_000)
    for step in range(60):
        made = batch(16 * step)
        objective(made, DRAW).total(made.counts).backward()
        optimizer.step()
        optimizer.zero_grad()
    flat = 191 / 192
    assert error(100_000) < min(0.8 * flat, untrained)
    assert np.isfinite(untrained)
