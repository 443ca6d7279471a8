"""Contrastive objectives: their losses, the views they read, and that no split of a step changes a gradient."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from parity_text import some_samples, word_tokenizer

from mmpre.batch import Views, pack
from mmpre.data.loader import MicroBatch, Slot
from mmpre.draw import Draw
from mmpre.encoder import bert_encoder
from mmpre.heads.pool import First, Mean, Tower
from mmpre.masking.random import RandomTokens
from mmpre.modalities.regions import RegionReader, Regions
from mmpre.modalities.text import Text, TextReader
from mmpre.network import Network
from mmpre.objectives.contrast import Contrast, InfoNCE, NTXent, SigLIP
from mmpre.objectives.protocol import InBatch
from mmpre.processes.processes import Processes
from mmpre.recipe import Task
from mmpre.training.gradients import Summed
from mmpre.training.loop import Context, Tally, _held_out, backward, step_counts
from mmpre.view import View

DRAW = Draw.micro_batch(0, 0, 0, 0)
A = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]])
B = torch.tensor([[1.0, 0, 1, 0], [0, 2, 0, 1], [1, 0, 0, 2]])


def unit(x):
    return F.normalize(x, dim=-1)


@pytest.mark.parametrize(("temperature", "expected"), [(0.04, 2.475214), (0.2, 1.134582)])
def test_ntxent_equals_pytorch_metric_learning(temperature, expected):
    loss = NTXent(temperature)
    assert loss(unit(A), unit(B)).item() / 3 == pytest.approx(expected, abs=1e-5)
    assert loss(unit(B), unit(A)).item() / 3 == pytest.approx(expected, abs=1e-5)
    order = torch.tensor([2, 0, 1])
    assert loss(unit(A[order]), unit(B[order])).item() / 3 == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("temperature", "one_way"), [(0.04, 2.647791), (0.2, 0.803546)])
def test_infonce_goes_one_way_or_both(temperature, one_way):
    assert InfoNCE(temperature, both=False)(unit(A), unit(B)).item() / 3 == pytest.approx(one_way, abs=1e-5)
    back = InfoNCE(temperature, both=False)(unit(B), unit(A)).item()
    both = InfoNCE(temperature)(unit(A), unit(B)).item()
    assert both == pytest.approx((3 * one_way + back) / 2, abs=1e-4)


def test_a_learned_temperature_gets_a_gradient_and_stays_below_its_limit():
    loss = InfoNCE(0.01, learned=True, most=20.0)
    assert loss.log_scale.exp().item() == pytest.approx(100)
    assert loss(unit(A), unit(B)).item() == pytest.approx(InfoNCE(0.05)(unit(A), unit(B)).item(), rel=1e-6)
    free = InfoNCE(0.07, learned=True)
    free(unit(A), unit(B)).backward()
    assert free.log_scale.grad.abs() > 0


def test_siglip_is_the_sum_of_one_sigmoid_a_pair():
    loss = SigLIP(scale=3.0, bias=-1.0)
    expected = 0.0
    for i, a in enumerate(unit(A)):
        for j, b in enumerate(unit(B)):
            score = 3 * float(a @ b) - 1
            expected += math.log1p(math.exp(-score if i == j else score))
    assert loss(unit(A), unit(B)).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("made", [lambda: InfoNCE(0.0), lambda: NTXent(-1.0)])
def test_a_temperature_of_0_or_less_is_refused(made):
    with pytest.raises(ValueError, match="temperature must be above 0, got"):
        made()


def towers(shared=False):
    torch.manual_seed(0)
    text = Text(TextReader(word_tokenizer(), max_length=16), width=32, dropout=0.0)
    image = Regions(RegionReader(16, 7), width=32, types=text.types, dropout=0.0)
    reads = Network({"text": text}, bert_encoder(32, 2, 4, dropout=0.0, attention_dropout=0.0))
    looks = Network({"image": image}, bert_encoder(32, 1, 4, dropout=0.0, attention_dropout=0.0))
    if shared:
        return {"a": Tower(reads, First("text")), "b": Tower(reads, Mean("text"))}
    return {"text": Tower(reads, First("text"), torch.nn.Linear(32, 8)),
            "image": Tower(looks, Mean("image"), torch.nn.Linear(32, 8))}  # fmt: skip


VIEWS = {"text": View(roles=("text",)), "image": View(roles=("image",))}


def views_of(samples, objective, first=0, views=VIEWS):
    rows = {name: [] for name in views}
    for i, sample in enumerate(samples):
        draw = Draw.row(0, 0, 0, epoch=0, unit=first + i)
        for name, view in views.items():
            rows[name].append(view.row(sample, objective.readers, draw.child("view", name), None))
    return Views({name: pack(rows[name], view.attend.plan) for name, view in views.items()})


def test_the_two_vectors_of_a_sample_stand_in_the_same_row_whatever_the_views_lengths():
    objective, samples = Contrast(towers(), InfoNCE(0.1)), some_samples(9)
    together = objective.features(views_of(samples, objective), DRAW)
    assert views_of(samples, objective)["text"].keys != views_of(samples, objective)["image"].keys
    for i, sample in enumerate(samples):
        alone = objective.features(views_of([sample], objective, first=i), DRAW)
        for name in ("text", "image"):
            torch.testing.assert_close(together[name][i], alone[name][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("pairing", [lambda: InfoNCE(0.1, learned=True), lambda: NTXent(0.1), SigLIP])
def test_no_split_of_a_step_changes_loss_or_gradient(pairing):
    samples = some_samples(12)

    def gradients(parts):
        objective = Contrast(towers(), pairing())
        size, mine = 12 // parts, []
        for m in range(parts):
            part = views_of(samples[m * size : (m + 1) * size], objective, m * size)
            mine.append(MicroBatch(Slot(0, m, "t", 0, 12), [part], [], []))
        context = Context(0, 0, Processes())
        counts, tally = step_counts(mine, context.processes), Tally()
        adding = Summed(list(objective.parameters()), context.processes, exact=True)
        backward(Task("t", VIEWS, objective), mine, counts, adding, tally, context)
        adding.finish()
        assert counts["rows"] == 12
        return tally.values(counts, context.processes), {n: p.grad for n, p in objective.named_parameters()}

    values, whole = gradients(1)
    for parts in (2, 4):
        split_values, split = gradients(parts)
        assert split_values == pytest.approx(values, rel=1e-5)
        for name, grad in whole.items():
            if grad is None:
                assert split[name] is None, name
                continue
            torch.testing.assert_close(split[name], grad, atol=1e-6, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_towers_may_share_a_network_and_mean_leaves_special_tokens_out():
    objective, samples = Contrast(towers(shared=True), NTXent(0.1)), some_samples(4)
    views = {"a": View(), "b": View()}
    batch = views_of(samples, objective, views=views)["b"]
    state_ND, mean_BD = objective.towers["b"].net(batch), objective.towers["b"](batch)
    start = 0
    for row, length in enumerate(batch.layout.lengths_B.tolist()):
        expected = state_ND[start + 1 : start + length - 1].mean(0)
        torch.testing.assert_close(mean_BD[row], expected, atol=1e-6, rtol=1e-5)
        start += length
    every = Mean("text", special=True)(objective.towers["b"].net, batch)
    torch.testing.assert_close(every[0], state_ND[: int(batch.layout.lengths_B[0])].mean(0), atol=1e-6, rtol=1e-5)


def test_wrong_towers_and_views_are_told():
    with pytest.raises(ValueError, match=r"wanted two towers by the names of their views, got \['text'\]"):
        Contrast({"text": towers()["text"]}, NTXent(0.1))
    objective = Contrast(towers(), NTXent(0.1))
    only = views_of(some_samples(2), objective, views={"text": VIEWS["text"]})
    with pytest.raises(KeyError, match=r"no view 'image'; the task makes \['text'\]"):
        objective.features(only, DRAW)
    one, other = towers(shared=True)["a"], towers(shared=True)["b"]
    with pytest.raises(ValueError, match="two towers read role 'text' in two ways"):
        _ = Contrast({"a": one, "b": other}, NTXent(0.1)).readers


def test_views_of_a_sample_draw_their_masks_apart_and_count_rows_once():
    objective = Contrast(towers(shared=True), NTXent(0.1))
    hide = RandomTokens(role="text", rate=0.5)
    views = {"a": View(picks={"x": hide}), "b": View(picks={"y": hide})}
    batch = views_of(some_samples(8), objective, views=views)
    assert batch["a"].picked["x"].clean_M.tolist() != batch["b"].picked["y"].clean_M.tolist()
    assert batch.counts["rows"] == 8
    assert batch.counts["tokens"] == batch["a"].layout.size + batch["b"].layout.size


def test_held_out_losses_over_a_step_are_taken_in_full_precision_as_in_training():
    """Cosines near 1 are steps of 1/256 apart in half precision, and a temperature makes them tenths of a nat."""
    seen = []

    class Watching:
        readers = None

        def features(self, batch, draw):
            return {"one": torch.randn(4, 8) @ torch.randn(8, 8)}

        def loss(self, features, sizes):
            seen.append((features["one"].dtype, torch.is_autocast_enabled("cpu")))
            return "loss"

    context = Context(0, 0, Processes(), bf16=True)
    assert isinstance(Watching(), InBatch)
    assert _held_out(Watching(), context, SimpleNamespace(counts={"rows": 4}), None) == "loss"
    assert seen == [(torch.float32, False)]
