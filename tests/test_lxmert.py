"""LXMERT against transformers' LxmertForPreTraining: states, losses, gradients; what it hides, and that it learns."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from asked_pictures import changed, some_pictures, tensors_of
from parity_text import SPECIALS, WORDS, AsUnits, some_batch, vary, word_tokenizer
from torch import nn

from mmpre.draw import Draw
from mmpre.encoder import two_stream_encoder
from mmpre.evaluation.labelled import Labelled
from mmpre.evaluation.rows import made_rows
from mmpre.exchange.imports import ImportedError, fill
from mmpre.exchange.key_table import to_ours, under
from mmpre.heads.answers import Answers
from mmpre.labels import NONE
from mmpre.objectives.one_pass import Classify, OnePass
from mmpre.plan import plan
from mmpre.processes.processes import Processes
from mmpre.recipes.bert import bert
from mmpre.recipes.imports import lxmert as family
from mmpre.recipes.lxmert import lxmert, scales
from mmpre.training.optim import set_learning_rate
from mmpre.view import OtherSample, View

DRAW = Draw.micro_batch(0, 0, 0, 0)
SIZES = dict(features=16, objects=7, attributes=5, answers=6)
SMALL = dict(
    width=32, language=2, relations=1, cross=2, heads=4, length=16, positions=16, regions=6, batch=8, micro_batches=1,
    steps=10, warmup=1, dropout=0.0, **SIZES,
)  # fmt: skip


@pytest.fixture(autouse=True)
def plugins(monkeypatch):
    """Those of this tree, whatever entry points are installed."""
    monkeypatch.setattr("mmpre.exchange.imports.survey", lambda kind: ({"lxmert": family}, {}))


@pytest.fixture
def tokenizer(tmp_path):
    word_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def small(tokenizer, **numbers):
    torch.manual_seed(0)
    recipe = lxmert(tokenizer=tokenizer, **SMALL | numbers)
    vary(recipe.module())
    return recipe


def batch_of(recipe, samples, **more):
    (task,) = recipe.stages[0].tasks
    return some_batch(task.view, task.objective.readers, samples, **more)


def objective_of(recipe):
    return recipe.stages[0].tasks[0].objective


def losses(recipe, batch):
    """Each term, divided and weighed."""
    return {
        term.name: term.weight * term.sum / max(1, batch.counts[term.per])
        for term in objective_of(recipe)(batch, DRAW).terms
    }


def the_model():
    config = transformers.LxmertConfig(
        vocab_size=len(SPECIALS) + len(WORDS), hidden_size=32, num_attention_heads=4, intermediate_size=128,
        l_layers=2, r_layers=1, x_layers=2, max_position_embeddings=16, visual_feat_dim=16, num_object_labels=7,
        num_attr_labels=5, num_qa_labels=6, visual_loss_normalizer=1 / 0.15, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = transformers.LxmertForPreTraining(config).eval()
    vary(theirs, seed=4)
    return theirs


def as_theirs(batch):
    """What their model takes, and what is no padding of words and of regions."""

    def rows(role, values):
        full = nn.utils.rnn.pad_sequence(list(values.split(batch.layout.lengths[role].tolist())), batch_first=True)
        return full, torch.arange(full.shape[1]) < batch.layout.lengths[role][:, None]

    ids_BT, word_BT = rows("text", batch.seen["text"]["ids"])
    features_BRE, region_BR = rows("image", batch.seen["image"]["features"].float())
    box_BR4, _ = rows("image", batch.seen["image"]["box"][:, :4])
    given = dict(
        input_ids=ids_BT, attention_mask=word_BT.long(), visual_feats=features_BRE, visual_pos=box_BR4,
        visual_attention_mask=region_BR.long(),
    )  # fmt: skip
    return given, word_BT, region_BR


def imported(tokenizer, theirs, folder, **numbers):
    theirs.save_pretrained(folder)
    recipe = small(tokenizer, **numbers)
    report = fill(recipe.module(), folder)
    assert (report.missing, report.left) == ([], [])
    return recipe


def test_states_of_rows_of_any_size_equal_those_of_transformers(tokenizer, tmp_path):
    theirs = the_model()
    recipe = imported(tokenizer, theirs, tmp_path / "theirs")
    batch = batch_of(recipe, some_pictures(11))
    assert len(set(batch.layout.lengths["image"].tolist())) > 3
    given, word_BT, region_BR = as_theirs(batch)
    want = theirs.lxmert(**given, output_hidden_states=True)
    states = recipe.network(batch, read=range(5))
    for role, last, valid in (("text", want.language_output, word_BT), ("image", want.vision_output, region_BR)):
        torch.testing.assert_close(states.last[batch.layout.index[role]], last[valid], atol=1e-5, rtol=0)
    before = states.layer[2][batch.layout.index["text"]]
    torch.testing.assert_close(before, want.language_hidden_states[1][word_BT], atol=1e-5, rtol=0)
    head = objective_of(recipe).readouts[1].head
    pooled = head.pool(states.last[batch.layout.first("text")]).tanh()
    torch.testing.assert_close(pooled, want.pooled_output, atol=1e-5, rtol=0)


def test_all_losses_and_gradients_equal_those_of_transformers(tokenizer, tmp_path):
    theirs = the_model()
    recipe = imported(tokenizer, theirs, tmp_path / "theirs", ask=0.99)
    batch = batch_of(recipe, some_pictures(24, regions=6))  # of theirs, padded regions would count
    given, _, _ = as_theirs(batch)
    picked, image = batch.picked["word"], batch.clean["image"]
    labels_N = torch.full((len(batch.clean["text"]),), -100)
    labels_N[picked.clean_M] = batch.clean["text"]["ids"][picked.clean_M]
    rows = labels_N.split(batch.layout.lengths["text"].tolist())
    hidden_N = torch.zeros(len(image)).index_fill(0, batch.picked["region"].clean_M, 1.0)
    told = {
        "object": (image["object"], image["object_confidence"]),
        "attribute": (image["attribute"], image["attribute_confidence"]),
        "feature": (image["features"].float(), hidden_N),
    }
    names = {"object": "obj", "attribute": "attr", "feature": "feat"}

    def visual(*wanted):
        return {
            names[one]: (label.view(24, 6, *label.shape[1:]), (weight * (one in wanted)).view(24, 6))
            for one, (label, weight) in told.items()
        }

    answer_B = batch.labels["answer"].masked_fill(batch.labels["answer"] < 0, -100)
    assert 2 <= int((answer_B >= 0).sum()) < int(batch.labels["matched"].sum()) and len(batch.picked["region"]) > 5
    wanted = {
        "mlm": dict(labels=nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-100)),
        "itm": dict(matched_label=batch.labels["matched"]),
        "qa": dict(ans=answer_B),
        **{one: dict(obj_labels=visual(one)) for one in told},
    }
    got = losses(recipe, batch)
    assert got.keys() == wanted.keys()
    for name, some in wanted.items():
        assert got[name].item() == pytest.approx(theirs(**given, **some).loss.item(), rel=1e-5), name
    every = {name: value for some in wanted.values() for name, value in some.items()}
    total = theirs(**given, **every | {"obj_labels": visual(*told)}).loss
    assert objective_of(recipe)(batch, DRAW).total(batch.counts).item() == pytest.approx(total.item(), rel=1e-5)

    total.backward()
    objective_of(recipe)(batch, DRAW).total(batch.counts).backward()
    grads = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False) if p.grad is not None}
    network = recipe.network
    parts = [
        (network.modalities["text"], under("", "lxmert.embeddings.", family.EMBEDDINGS)),
        (network.modalities["image"], under("", "lxmert.encoder.visn_fc.", family.REGIONS)),
        (network.encoder, family.layers(2, 1, 2)),
        *((next(one for one in recipe.module().modules() if _is(one, kind)), table)
          for kind, table in family.HEADS.items()),
    ]  # fmt: skip
    compared = 0
    for module, table in parts:
        want, ours = to_ours(table, grads.__getitem__), dict(module.named_parameters())
        for name, grad in want.items():
            own = ours[name].grad
            if name in ("positions.weight", "types.weight"):  # theirs freezes row 0 by its padding index
                own, grad = own[1:], grad[1:]
            torch.testing.assert_close(own, grad, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
            compared += 1
    assert compared > 80


def _is(module, kind):
    kind, field = kind if isinstance(kind, tuple) else (kind, None)
    return type(module) is kind and field in (None, getattr(module, "field", None))


def test_the_base_scale_has_the_number_of_parameters_of_transformers(tmp_path):
    word_tokenizer(30_522).save(str(tmp_path / "tokenizer.json"))
    with torch.device("meta"):
        recipe = lxmert(tokenizer=str(tmp_path / "tokenizer.json"))
        theirs = transformers.LxmertForPreTraining(transformers.LxmertConfig())

    def count(module):
        return sum(p.numel() for p in module.parameters())

    pooler = objective_of(recipe).readouts[1].head.pool
    assert count(recipe.network) + count(pooler) == 207_936_768 == count(theirs.lxmert)
    assert count(recipe.module()) == count(theirs)
    across = recipe.network.encoder.blocks[-1].sublayers[0]
    assert count(across) == 4 * 768 * 769 + 2 * 768  # one attention, which both sides share


def states_of(recipe, samples):
    """Each sample's states of each role, with nothing hidden or swapped."""
    batch = some_batch(View(), recipe.network.readers, samples)
    state_ND, layout = recipe.network(batch), batch.layout
    split = {role: state_ND[layout.index[role]].split(layout.lengths[role].tolist()) for role in layout.roles}
    return {key: {role: split[role][row] for role in layout.roles} for row, key in enumerate(batch.keys)}


def test_a_row_among_others_equals_the_row_alone_and_knows_nothing_of_its_neighbours(tokenizer):
    recipe, samples = small(tokenizer), some_pictures(9)
    together = states_of(recipe, samples)
    for sample in samples:
        alone = states_of(recipe, [sample])[sample.key]
        for role in ("text", "image"):
            torch.testing.assert_close(together[sample.key][role], alone[role], atol=1e-5, rtol=0)
    other = changed(samples[0], features=tensors_of(samples[0])["features"] * -3)
    after = states_of(recipe, [other, *samples[1:]])
    assert not torch.allclose(together["000"]["text"], after["000"]["text"])
    assert all(torch.equal(together[s.key]["text"], after[s.key]["text"]) for s in samples[1:])


def test_turning_regions_with_their_boxes_turns_their_states_and_leaves_the_words(tokenizer):
    recipe, (sample,) = small(tokenizer), some_pictures(1, regions=6)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    turned = changed(sample, **{name: value[order].contiguous() for name, value in tensors_of(sample).items()})
    before, after = (states_of(recipe, [one])["000"] for one in (sample, turned))
    torch.testing.assert_close(before["text"], after["text"], atol=1e-5, rtol=0)
    torch.testing.assert_close(before["image"][order], after["image"], atol=1e-5, rtol=0)
    moved = changed(sample, boxes=tensors_of(sample)["boxes"][order].contiguous())
    assert not torch.allclose(states_of(recipe, [moved])["000"]["text"], before["text"])


@pytest.mark.parametrize("cross", [2, 0])
def test_words_do_not_know_the_picture_before_the_layers_across(tokenizer, cross):
    recipe = small(tokenizer, cross=cross)
    sample = some_pictures(1, regions=6)[0]
    other = changed(sample, features=tensors_of(sample)["features"] * -3)
    batches = [some_batch(View(), recipe.network.readers, [one]) for one in (sample, other)]
    before, after = (recipe.network(batch, read=range(3 + cross)) for batch in batches)
    words = batches[0].layout.index["text"]
    assert torch.equal(before.layer[2][words], after.layer[2][words])
    assert torch.equal(before.last[words], after.last[words]) == (cross == 0)
    assert not torch.allclose(before.layer[1], after.layer[1])


def test_it_hides_as_the_paper_says_and_never_boxes(tokenizer):
    recipe = small(tokenizer, regions=36, features=4)
    samples = some_pictures(1_600, regions=36, features=4)
    batch = batch_of(recipe, samples)
    clean, seen, picked = batch.clean["image"], batch.seen["image"], batch.picked["region"].clean_M
    assert len(picked) / len(clean) == pytest.approx(0.15, abs=0.005)
    assert batch.counts["ordinary:region"] == len(clean) == len(batch.picked["seen"])
    assert torch.equal(clean["box"], seen["box"]) and torch.equal(clean["object"], seen["object"])
    same_N = (clean["features"] == seen["features"]).all(1)
    zero_N = (seen["features"] == 0).all(1)
    assert torch.isin((~same_N).nonzero().squeeze(1), picked).all()
    assert zero_N[picked].float().mean() == pytest.approx(0.8, abs=0.01)
    assert same_N[picked].float().mean() == pytest.approx(0.1, abs=0.01)
    random_M = picked[~zero_N[picked] & ~same_N[picked]]
    assert len(random_M) / len(picked) == pytest.approx(0.1, abs=0.01)
    row_N = torch.repeat_interleave(torch.arange(len(batch.keys)), clean.lengths_B)
    number = {bytes(f.numpy().tobytes()): i for i, f in enumerate(clean["features"])}
    from_M = torch.tensor([number[bytes(f.numpy().tobytes())] for f in seen["features"][random_M]])
    assert (row_N[from_M] != row_N[random_M]).all(), "of another picture"
    words, hidden = batch.clean["text"], batch.picked["word"].clean_M
    assert len(hidden) / int((words.special_N < 0).sum()) == pytest.approx(0.15, abs=0.01)
    assert batch.replaced["text"][hidden].float().mean() == pytest.approx(0.8, abs=0.02)
    assert not batch.replaced["image"].any(), "the modality reads what stands there"


def test_what_hidden_regions_and_words_were_changes_no_state(tokenizer):
    recipe, samples = small(tokenizer), some_pictures(8)
    before = batch_of(recipe, samples)
    hidden = {}
    image, start = before.clean["image"], 0
    zero_N = (before.seen["image"]["features"] == 0).all(1)
    for row, key in enumerate(before.keys):
        count = int(image.lengths_B[row])
        hidden[key] = zero_N[start : start + count]
        start += count
    assert sum(int(one.sum()) for one in hidden.values()) > 1
    others = []
    for sample in samples:
        tensors = tensors_of(sample)
        tensors["features"][hidden[sample.key]] = 7.0
        tensors["object"][hidden[sample.key]] = 0
        others.append(changed(sample, **tensors))
    # one sample at a time: the others lend it features
    for i, other in enumerate(others):
        if hidden[other.key].any():
            after = batch_of(recipe, [*samples[:i], other, *samples[i + 1 :]])
            row = before.keys.index(other.key)
            place = torch.nonzero(before.layout.row_N == row).squeeze(1)
            assert torch.equal(recipe.network(before)[place], recipe.network(after)[place])
    words, picked = before.clean["text"], before.picked["word"].clean_M
    masked = before.replaced["text"]
    ids = before.seen["text"]["ids"].clone()
    ids[masked] = 9
    shown = replace(before, seen={**before.seen, "text": before.seen["text"].with_values(ids=ids)})
    assert masked.any() and len(picked) and not torch.equal(words["ids"], ids)
    assert torch.equal(recipe.network(before), recipe.network(shown))


def test_features_are_learned_of_hidden_regions_alone_and_labels_of_all(tokenizer):
    recipe = small(tokenizer)
    batch = batch_of(recipe, some_pictures(8))
    image, picked = batch.clean["image"], batch.picked["region"].clean_M
    others = torch.ones(len(image), dtype=torch.bool)
    others[picked] = False

    def with_clean(**values):
        return losses(recipe, replace(batch, clean={**batch.clean, "image": image.with_values(**values)}))

    first = losses(recipe, batch)
    features = with_clean(features=torch.where(others[:, None], -image["features"], image["features"]))
    assert torch.equal(features["feature"], first["feature"])
    hidden = with_clean(features=torch.where(others[:, None], image["features"], -image["features"] + 1))
    assert not torch.equal(hidden["feature"], first["feature"])
    for kind, count in (("object", 7), ("attribute", 5)):
        labels = with_clean(**{kind: torch.where(others, (image[kind] + 1) % count, image[kind])})
        assert not torch.equal(labels[kind], first[kind])
        assert all(torch.equal(labels[name], first[name]) for name in first if name != kind)
    unsure = with_clean(attribute_confidence=torch.zeros(len(image)))
    assert unsure["attribute"] == 0 and first["attribute"] > 0


def test_sentences_come_from_another_picture_for_half_of_the_rows_and_answers_count_on_matching_ones(tokenizer):
    recipe = small(tokenizer, ask=0.5)
    samples = some_pictures(400)
    twin = replace(samples[1], key="twin", members={**samples[1].members, "txt": b"w1"})
    batch = batch_of(recipe, [*samples, twin])
    read = recipe.network.readers["text"]
    by_key = {sample.key: sample for sample in [*samples, twin]}
    ids = batch.clean["text"]["ids"].split(batch.clean["text"].lengths_B.tolist())
    features = batch.clean["image"]["features"].split(batch.clean["image"].lengths_B.tolist())
    asked = 0
    for row, key in enumerate(batch.keys):
        members = by_key[key].members
        assert torch.equal(features[row], tensors_of(by_key[key])["features"]), "the picture is the row's own"
        own = [read.vocabulary.cut(members[s].decode())[0].tolist() for s in ("txt", "question.txt") if s in members]
        shown = ids[row][1:-1].tolist()
        matched, answer = batch.labels["matched"][row], batch.labels["answer"][row]
        assert (shown in own) == bool(matched)
        if answer >= 0:
            assert matched == 1 and shown == own[1] and int(answer) == json.loads(members["answer.json"])
            asked += 1
        elif matched:
            assert shown == own[0]
    assert 0.42 < batch.labels["matched"].float().mean() < 0.58
    assert 25 < asked < 75 and batch.counts["labelled:answer"] == asked


def test_another_text_of_the_same_picture_is_no_other_sample(tokenizer):
    recipe = small(tokenizer)
    first = some_pictures(1)[0]
    same = [replace(first, key=str(i), members={**first.members, "txt": f"w{i}".encode()}) for i in range(12)]
    batch = batch_of(recipe, same)
    assert batch.labels["matched"].all()
    plain = replace(recipe.stages[0].tasks[0].view, donors={"text": OtherSample(share=0.5)})
    assert not some_batch(plain, recipe.network.readers, same).labels["matched"].all()


def test_a_batch_without_questions_or_hidden_tokens_has_a_finite_loss(tokenizer):
    recipe = small(tokenizer, hide=1e-9)
    batch = batch_of(recipe, some_pictures(6, asked=False))
    assert batch.counts["labelled:answer"] == batch.counts["picked:word"] == 0
    total = objective_of(recipe)(batch, DRAW).total(batch.counts)
    assert total.isfinite()
    total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in recipe.module().parameters())


@pytest.mark.parametrize(
    ("vision", "learned"),
    [("both", {"object", "attribute", "feature"}), ("labels", {"object", "attribute"}), ("feature", {"feature"}),
     ("none", set())],
)  # fmt: skip
def test_what_is_learned_of_regions_can_be_left_out(tokenizer, vision, learned):
    recipe = small(tokenizer, vision=vision, ask=0.0)
    batch = batch_of(recipe, some_pictures(6))
    assert losses(recipe, batch).keys() == {"mlm", "itm"} | learned


def test_every_parameter_gets_a_gradient(tokenizer):
    for cross in (2, 0):
        recipe = small(tokenizer, ask=0.9, cross=cross)
        batch = batch_of(recipe, some_pictures(24))
        objective_of(recipe)(batch, DRAW).total(batch.counts).backward()
        assert [name for name, p in recipe.module().named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("cross", [2, 0])
def test_all_five_losses_fall(tokenizer, cross):
    torch.manual_seed(0)
    recipe = lxmert(tokenizer=tokenizer, **SMALL | dict(ask=0.9, cross=cross, lr=3e-3, steps=120, warmup=5))
    stage, samples = recipe.stages[0], some_pictures(16)
    optimizer = stage.optimizer.build(recipe.module().named_parameters())
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.01}
    course = {}
    for step in range(120):
        set_learning_rate(optimizer, stage.optimizer.schedule, step)
        batch = batch_of(recipe, samples, epoch=0)
        for name, loss in losses(recipe, batch).items():
            course.setdefault(name, []).append(loss.item())
        optimizer.zero_grad()
        objective_of(recipe)(batch, DRAW).total(batch.counts).backward()
        optimizer.step()
    assert course.keys() == {"mlm", "itm", "qa", "object", "attribute", "feature"}
    for name, values in course.items():
        assert sum(values[-5:]) < 0.8 * sum(values[:5]), name


def test_its_step_can_be_planned_and_its_scales_name_numbers_that_it_takes(tokenizer):
    flops = [
        plan("lxmert", tokenizer=tokenizer, **SMALL | some)["stages"][0]["flops"]
        for some in ({}, {"cross": 0, "language": 4, "relations": 3}, {"vision": "none"})
    ]
    assert flops[0] > flops[1] > 0.5 * flops[0] and flops[0] > flops[2]
    for numbers in scales.values():
        with torch.device("meta"):
            recipe = lxmert(tokenizer=tokenizer, **numbers)
        assert len(recipe.network.encoder.blocks) == numbers.get("language", 9) + numbers.get("cross", 5)


def test_what_cannot_be_built_or_read_is_told(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"a layer in all, got own \{'text': 0, 'image': 0\} and across 0"):
        two_stream_encoder(32, 4, own={"text": 0, "image": 0}, across=0)
    recipe = small(tokenizer, ask=0.0)
    batch = batch_of(recipe, some_pictures(2))
    pool = objective_of(recipe).readouts[1].head.pool
    with pytest.raises(KeyError, match="Classify: no label 'answer' in the batch, only"):
        OnePass(recipe.network, [Classify("text", Answers(pool, 6), label="answer")])(batch, DRAW)
    the_model().save_pretrained(tmp_path / "theirs")
    with pytest.raises(ImportedError, match="has parts for the roles image, which the recipe's network has not"):
        fill(bert(tokenizer=tokenizer, width=32, depth=1, heads=4, length=16).module(), tmp_path / "theirs")


def test_answers_are_asked_of_held_out_rows_whole_and_of_their_own_picture(tokenizer):
    recipe = small(tokenizer)
    (asked,) = [one for one in recipe.evaluations if isinstance(one, Labelled)]
    samples = some_pictures(12)
    with torch.no_grad():  # an answer that the picture and the question have no part in
        answer = next(one for one in objective_of(recipe).readouts if isinstance(one, Classify))
        answer.head.answer.weight.zero_()
        answer.head.answer.bias.zero_()
        answer.head.answer.bias[3] = 1.0
    rows = [row for row, _ in made_rows(asked.view, asked.readers, AsUnits(samples), 12)]
    assert not any(row.replaced[role].any() for row in rows for role in row.replaced) and not rows[0].picked
    labels = [int(row.labels["answer"]) for row in rows]
    (result,) = asked.run(AsUnits(samples), Processes())
    assert result.n == sum(label != NONE for label in labels) > 3
    assert result.value == pytest.approx(labels.count(3) / result.n)
