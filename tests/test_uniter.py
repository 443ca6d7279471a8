from functools import partial

import pytest
import torch
import transformers
from parity_text import (
    copy_embeddings,
    copy_encoder,
    padded,
    some_batch,
    some_samples,
    vary,
    word_tokenizer,
)
from safetensors.torch import load, save
from torch import nn

from mmpre.data.sample import Sample
from mmpre.draw import Draw
from mmpre.masking.protocol import untouched
from mmpre.recipes.uniter import claim, scales, uniter
from mmpre.view import View

DRAW = Draw.micro_batch(0, 0, 0, 0)
SMALL = dict(width=32, depth=3, heads=4, length=16, positions=16, features=16, classes=7, dropout=0.0)
SAMPLES = some_samples(12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    word_tokenizer().save(str(path))
    return str(path)


@pytest.fixture
def recipe(tokenizer):
    torch.manual_seed(0)
    made = uniter(tokenizer=tokenizer, **SMALL)
    vary(made.module())
    return made


def task(recipe, name):
    return {task.name: task for task in recipe.stages[0].tasks}[name]


def changed(sample, **tensors):
    members = dict(sample.members)
    members["regions.safetensors"] = save(load(members["regions.safetensors"]) | tensors)
    return Sample(sample.key, sample.shard, sample.digest, members)


def tensors_of(sample):
    return load(sample.members["regions.safetensors"])


def states_by_key(net, batch):
    """Each sample's states of each role."""
    state_ND, layout = net(batch), batch.layout
    split = {role: state_ND[layout.index[role]].split(layout.lengths[role].tolist()) for role in layout.roles}
    return {key: {role: split[role][row] for role in layout.roles} for row, key in enumerate(batch.keys)}


def test_text_alone_gives_the_states_of_transformers_bert(recipe):
    net = recipe.network
    config = transformers.BertConfig(
        vocab_size=net.modalities["text"].reader.vocabulary.size, hidden_size=32, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=128, max_position_embeddings=16,
    )  # fmt: skip
    theirs = transformers.BertModel(config, add_pooling_layer=False).eval()
    vary(theirs, seed=5)
    copy_embeddings(net.modalities["text"], theirs.embeddings)
    copy_encoder(net.encoder, theirs.encoder)
    batch = some_batch(View(roles=("text",)), net.readers, SAMPLES)
    ids, valid = padded(batch)
    expected = theirs(input_ids=ids, attention_mask=valid.long()).last_hidden_state[valid]
    torch.testing.assert_close(net(batch), expected, atol=1e-5, rtol=0)


def test_text_and_regions_give_the_states_of_a_padded_encoder(recipe):
    net = recipe.network
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(32, 4, 128, 0.0, "gelu", 1e-12, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    vary(theirs, seed=6)
    with torch.no_grad():
        for block, one in zip(net.encoder.blocks, theirs.layers, strict=True):
            attention, feed_forward = block.sublayers
            attention.sublayer.qkv.weight.copy_(one.self_attn.in_proj_weight)
            attention.sublayer.qkv.bias.copy_(one.self_attn.in_proj_bias)
            pairs = [
                (attention.sublayer.out, one.self_attn.out_proj), (attention.norm, one.norm1),
                (feed_forward.sublayer.up, one.linear1), (feed_forward.sublayer.down, one.linear2),
                (feed_forward.norm, one.norm2),
            ]  # fmt: skip
            for ours, source in pairs:
                ours.load_state_dict(source.state_dict())
    batch = some_batch(task(recipe, "mrfr").view, net.readers, SAMPLES)
    assert batch.replaced["image"].any()
    x_BLD, valid = padded(batch, net.embed(batch))
    expected = theirs(x_BLD, src_key_padding_mask=~valid)[valid]
    torch.testing.assert_close(net(batch), expected, atol=1e-5, rtol=0)


def test_a_sample_among_others_equals_the_sample_alone(recipe):
    net = recipe.network
    together = states_by_key(net, some_batch(View(), net.readers, SAMPLES))
    for sample in SAMPLES:
        alone = states_by_key(net, some_batch(View(), net.readers, [sample]))[sample.key]
        for role in ("text", "image"):
            torch.testing.assert_close(together[sample.key][role], alone[role], atol=1e-5, rtol=0)


def test_changing_a_neighbour_changes_nothing(recipe):
    net = recipe.network
    other = changed(SAMPLES[0], features=tensors_of(SAMPLES[0])["features"] * -3)
    before = states_by_key(net, some_batch(View(), net.readers, SAMPLES))
    after = states_by_key(net, some_batch(View(), net.readers, [other, *SAMPLES[1:]]))
    assert not torch.allclose(before["000"]["text"], after["000"]["text"])
    for sample in SAMPLES[1:]:
        for role in ("text", "image"):
            assert torch.equal(before[sample.key][role], after[sample.key][role])


def test_turning_regions_with_their_boxes_turns_their_states_and_leaves_the_words(recipe):
    net = recipe.network
    sample = next(one for one in SAMPLES if len(tensors_of(one)["boxes"]) > 3)
    order = torch.randperm(len(tensors_of(sample)["boxes"]), generator=torch.Generator().manual_seed(1))
    turned = changed(sample, **{name: value[order].contiguous() for name, value in tensors_of(sample).items()})
    before, after = (states_by_key(net, some_batch(View(), net.readers, [one]))[sample.key] for one in (sample, turned))
    torch.testing.assert_close(before["text"], after["text"], atol=1e-5, rtol=0)
    torch.testing.assert_close(before["image"][order], after["image"], atol=1e-5, rtol=0)
    moved = changed(sample, boxes=tensors_of(sample)["boxes"][order].contiguous())
    after = states_by_key(net, some_batch(View(), net.readers, [moved]))[sample.key]
    assert not torch.allclose(before["text"], after["text"])


@pytest.mark.parametrize(("name", "hidden", "whole"), [("mlm", "text", "image"), ("mrfr", "image", "text")])
def test_a_task_hides_one_side_and_leaves_the_other_as_it_is(recipe, name, hidden, whole):
    batch = some_batch(task(recipe, name).view, recipe.network.readers, SAMPLES)
    (picked,) = batch.picked.values()
    assert picked.role == hidden and len(picked) >= len(SAMPLES)
    assert not batch.replaced[whole].any() and batch.replaced[hidden].any()
    for field in batch.clean[whole].fields:
        assert torch.equal(batch.seen[whole][field], batch.clean[whole][field])


def test_joint_masking_hides_both_sides_but_keeps_one_loss_a_step(tokenizer):
    joint = uniter(tokenizer=tokenizer, joint=True, **SMALL)
    for name in ("mlm", "mrfr", "mrckl"):
        batch = some_batch(task(joint, name).view, joint.network.readers, SAMPLES)
        assert batch.replaced["text"].any() and batch.replaced["image"].any()
        loss = task(joint, name).objective(batch, DRAW)
        assert [term.name for term in loss.terms] == [name]


def test_its_claim_compares_both_maskings_on_rows_that_hide_one_side(tokenizer, recipe):
    other = claim.against["joint masking"]
    joint = uniter(tokenizer=tokenizer, **SMALL | other.numbers)
    for name, whole in (("mlm", "image"), ("mrfr", "text"), ("mrckl", "text")):
        held_out = [task(one, name).held_out for one in (recipe, joint)]
        batches = [some_batch(view, recipe.network.readers, SAMPLES) for view in held_out]
        assert not any(batch.replaced[whole].any() for batch in batches)
        (picked,), (same,) = (batch.picked.values() for batch in batches)
        assert torch.equal(picked.clean_M, same.clean_M)


def test_a_hidden_regions_feature_and_label_change_no_state_and_no_other_target(recipe):
    net, mrfr = recipe.network, task(recipe, "mrfr")
    make = partial(some_batch, mrfr.view, net.readers)
    before = make(SAMPLES)
    image, start, others = before.clean["image"], 0, {}
    for row, key in enumerate(before.keys):
        count = int(image.lengths_B[row])
        hidden = before.replaced["image"][start : start + count]
        tensors = tensors_of(SAMPLES[int(key)])
        tensors["features"][hidden] = 7.0
        tensors["soft"][hidden] = 1 / 7
        others[key] = changed(SAMPLES[int(key)], **tensors)
        start += count
    after = make([others[sample.key] for sample in SAMPLES])
    assert torch.equal(before.replaced["image"], after.replaced["image"])
    assert not torch.equal(before.clean["image"]["features"], after.clean["image"]["features"])
    assert torch.equal(net(before), net(after))
    first, second = (mrfr.objective(batch, DRAW).terms[0].sum for batch in (before, after))
    assert not torch.allclose(first, second), "the target is the clean feature"


def test_the_masked_rows_reach_the_projection_as_the_mask_vector_and_targets_stay(recipe):
    image = recipe.network.modalities["image"]
    batch = some_batch(task(recipe, "mrfr").view, recipe.network.readers, SAMPLES)
    came = []
    handle = image.project.register_forward_pre_hook(lambda module, args: came.append(args[0]))
    recipe.network(batch)
    handle.remove()
    replaced_N, clean = batch.replaced["image"], batch.clean["image"]["features"].float()
    assert torch.equal(came[0][replaced_N], image.mask_E.expand(int(replaced_N.sum()), -1))
    assert torch.equal(came[0][~replaced_N], clean[~replaced_N])
    assert clean[replaced_N].abs().sum() > 0


def test_mismatched_pairs_take_the_regions_of_another_sample_and_exist_in_matching_alone(recipe):
    itm = task(recipe, "itm")
    batch = some_batch(itm.view, recipe.network.readers, SAMPLES)
    matched = dict(zip(batch.keys, batch.labels["matched"].tolist(), strict=True))
    features = batch.clean["image"]["features"].split(batch.clean["image"].lengths_B.tolist())
    for key, got in zip(batch.keys, features, strict=True):
        own = tensors_of(SAMPLES[int(key)])["features"]
        assert (got.shape == own.shape and torch.equal(got, own)) == bool(matched[key])
    assert 0 < sum(matched.values()) < len(SAMPLES)
    assert not batch.picked and untouched(batch.clean["text"]).replaced_N.sum() == 0
    assert all(not task(recipe, name).view.donors for name in ("mlm", "mrfr", "mrckl"))


def test_all_tasks_share_one_network_and_tie_their_heads(recipe):
    net = recipe.network
    assert all(one.objective.net is net for one in recipe.stages[0].tasks)
    word_head, region_head = (task(recipe, name).objective.readouts[0].head for name in ("mlm", "mrfr"))
    assert word_head.table.weight is net.modalities["text"].table.weight
    assert region_head.project.weight is net.modalities["image"].project.weight
    assert net.modalities["image"].types is net.modalities["text"].types


def test_every_parameter_but_the_unused_ones_gets_a_gradient_from_some_task(recipe):
    for one in recipe.stages[0].tasks:
        batch = some_batch(one.view, one.objective.readers, SAMPLES)
        one.objective(batch, DRAW).total(batch.counts).backward()
    without = [name for name, p in recipe.module().named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_tasks_take_turns_two_to_two_to_one_to_one(recipe):
    names = [recipe.stages[0].task_at(step, seed=0).name for step in range(600)]
    assert {name: names.count(name) for name in set(names)} == {"itm": 200, "mlm": 200, "mrfr": 100, "mrckl": 100}


def test_alignment_is_a_tenth_of_the_matching_steps_loss_and_can_be_left_out(tokenizer, recipe):
    batch = some_batch(task(recipe, "itm").view, recipe.network.readers, SAMPLES)
    assert [(t.name, t.weight) for t in task(recipe, "itm").objective(batch, DRAW).terms] == [
        ("itm", 1.0),
        ("wra", 0.1),
    ]
    without = uniter(tokenizer=tokenizer, wra=0.0, **SMALL)
    assert [term.name for term in task(without, "itm").objective(batch, DRAW).terms] == ["itm"]


@pytest.mark.parametrize(
    ("learn", "told"),
    [
        (("mlm", "mrfr", "mrckl"), ("Grounding", "Reading")),
        (("itm", "mlm", "mrfr", "mrc"), ("PairRetrieval", "Grounding", "Reading")),
    ],
)
def test_tasks_can_be_left_out_and_so_is_what_asks_their_heads(learn, told, tokenizer):
    made = uniter(tokenizer=tokenizer, learn=learn, **SMALL)
    assert tuple(one.name for one in made.stages[0].tasks) == learn
    assert {made.stages[0].task_at(step, seed=0).name for step in range(60)} == set(learn)
    assert tuple(type(one).__name__ for one in made.evaluations) == told
    heads = [name for name, _ in made.module().named_parameters() if name.startswith("tasks.")]
    assert {name.split(".")[1] for name in heads} <= set(learn)
    with pytest.raises(ValueError, match="learn wants some of itm, mlm, mrfr, mrckl and mrc, got mlm wra"):
        uniter(tokenizer=tokenizer, learn=("mlm", "wra"), **SMALL)


def test_the_base_scale_has_the_papers_parameter_counts(tmp_path):
    word_tokenizer(28_996).save(str(tmp_path / "tokenizer.json"))
    with torch.device("meta"):
        recipe = uniter(tokenizer=str(tmp_path))

    def millions(module):
        return sum(p.numel() for p in module.parameters()) / 1e6

    assert millions(recipe.network.encoder) == pytest.approx(85.05, abs=0.01)
    pooler = 768 * 768 + 768  # counted with the model by the authors
    assert millions(recipe.network) + pooler / 1e6 == pytest.approx(109.9, abs=0.1)
    assert millions(recipe.module()) == pytest.approx(112.9, abs=0.1)


def test_the_tiny_scale_learns_every_task(tokenizer):
    torch.manual_seed(0)
    small = uniter(tokenizer=tokenizer, **SMALL | dict(depth=2))
    parameters = list(small.module().parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    losses = {}
    for step in range(240):
        one = small.stages[0].task_at(step, seed=0)
        batch = some_batch(one.view, one.objective.readers, SAMPLES, epoch=0)
        loss = one.objective(batch, DRAW).total(batch.counts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.setdefault(one.name, []).append(loss.item())
    assert set(losses) == {"itm", "mlm", "mrfr", "mrckl"}
    for name, course in losses.items():
        assert sum(course[-5:]) < 0.8 * sum(course[:5]), name


def test_scales_name_numbers_that_the_recipe_takes(tokenizer):
    for numbers in scales.values():
        with torch.device("meta"):
            recipe = uniter(tokenizer=tokenizer, **numbers)
        assert len(recipe.network.encoder.blocks) == numbers.get("depth", 12)
