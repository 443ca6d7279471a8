"""The UNITER benchmark: the padded model is the packed one, padding aside, and both see the same rows."""

import numpy as np
import pytest
import torch
from parity_text import copy_encoder, vary

from mmpre.data.loader import slots
from mmpre.draw import Draw
from mmpre.recipes.benchmarks import uniter
from mmpre.recipes.benchmarks.padded_uniter import PaddedBatches, PaddedUniter
from mmpre.recipes.benchmarks.pairs import caption_words, region_count, write_pairs

DRAW = Draw.micro_batch(0, 0, 0, 0)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    data, tokenizer = write_pairs(tmp_path_factory.mktemp("pairs"), 40, features=16, classes=7)
    return dict(
        data=str(data), tokenizer=str(tokenizer), width=32, depth=2, features=16, classes=7, batch=4, steps=6,
        dropout=0.0,
    )  # fmt: skip


def test_lengths_are_as_the_file_says():
    rng = np.random.default_rng(1)
    words = [caption_words(rng) for _ in range(4000)]
    regions = [region_count(rng) for _ in range(4000)]
    assert (min(words), np.mean(words)) == (5, pytest.approx(12, abs=0.3)) and max(words) <= 60
    assert (min(regions), np.mean(regions)) == (10, pytest.approx(38, abs=1)) and max(regions) == 100


def test_all_contenders_count_real_tokens_and_padded_sees_the_packed_rows(tiny):
    packed, padded, buckets = (uniter.CONTENDERS[name](**tiny) for name in ("packed", "padded", "buckets"))
    assert packed.amount == padded.amount
    assert buckets.amount == pytest.approx(packed.amount, rel=0.4)
    assert buckets.more["padding %"] < padded.more["padding %"]


@torch.no_grad()
def share_weights(model, recipe):
    """The padded model's encoder in ours, and everything else of ours in the padded model."""
    text, image = (recipe.network.modalities[role] for role in ("text", "image"))
    tables = model.bert.embeddings
    tables.word_embeddings.weight.copy_(text.table.weight)
    tables.position_embeddings.weight[:512].copy_(text.positions.weight)
    tables.token_type_embeddings.weight.copy_(text.types.weight)
    for name in ("project", "project_norm", "place", "place_norm"):
        getattr(model, name).load_state_dict(getattr(image, name).state_dict())
    model.mask_E.copy_(image.mask_E)
    for task in recipe.stages[0].tasks:
        model.readouts[task.name].load_state_dict(task.objective.readouts.state_dict())
    vary(model.bert.encoder)
    copy_encoder(recipe.network.encoder, model.bert.encoder)


def test_the_padded_model_has_the_losses_and_states_of_the_packed_one(tiny):
    case = uniter.Case(**tiny)
    recipe = uniter.recipe_of(case)
    source, stage = uniter.source_of(case, recipe), recipe.stages[0]
    model = PaddedUniter(width=32, depth=2, heads=1, features=16, classes=7, vocabulary=28_996, dropout=0.0)
    share_weights(model, recipe)
    seen = set()
    for slot in slots(stage, 0, 0, 6, 0, 1):
        (packed,), (padded,) = source[slot].parts, PaddedBatches(source)[slot].parts
        objective = next(task.objective for task in stage.tasks if task.name == slot.task)
        ours = objective(packed, DRAW).total(packed.counts)
        theirs = model(slot.task, padded, DRAW).total(packed.counts)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        state_ND = model.states(padded).flatten(0, 1)[padded.place_N]
        torch.testing.assert_close(recipe.network(packed), state_ND, rtol=1e-4, atol=1e-5)
        seen.add(slot.task)
    assert seen == {"itm", "mlm", "mrfr", "mrckl"}
