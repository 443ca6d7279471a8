"""w2v-BERT: quantizer and losses against transformers', its mask, what its tap and its rows may see, that it learns."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from sounds import encoded, sample, sound
from torch import nn
from transformers.models.wav2vec2.modeling_wav2vec2 import Wav2Vec2ForPreTraining, Wav2Vec2GumbelVectorQuantizer

import mmpre
from mmpre.batch import pack
from mmpre.command_line.cli import main
from mmpre.data.index import open_shards
from mmpre.data.shards import ShardReader, shard_writer
from mmpre.data.units import Units
from mmpre.draw import Draw
from mmpre.encoder import conformer_encoder
from mmpre.evaluation.codes import OwnCodesUse
from mmpre.gumbel import Chosen, GumbelCodes, perplexity
from mmpre.modalities.speech import FbankReader, Speech
from mmpre.network import Network
from mmpre.objectives.own_codes import Others, OwnCodes
from mmpre.plan import PlanOptions, plan
from mmpre.plugins import find_recipe
from mmpre.processes.processes import Processes
from mmpre.recipes.w2v_bert import scales, w2v_bert
from mmpre.runs.metrics import read_metrics
from mmpre.runs.options import RunOptions
from mmpre.schedules import ExponentialRamp
from mmpre.tokens import Tokens
from mmpre.training.optim import set_learning_rate

DRAW = Draw.micro_batch(0, 0, 0, 0)
SMALL = dict(
    stack=2, channels=(), span_ms=200.0, width=32, depth=1, more_depth=1, heads=2, kernel=5, codes=16, values=16,
    compare=16, distractors=8, noise=0.0, batch=4, micro_batches=1, steps=8, warmup=1, lr=1e-3, valid_every=100,
)  # fmt: skip


def some_recipe(**numbers):
    torch.manual_seed(0)
    return w2v_bert(**SMALL | numbers)


def batch_of(task, waves, epoch=0):
    rows = [
        task.view.row(sample(wave), task.objective.readers, Draw.row(0, 0, 0, epoch=epoch, unit=i), None)
        for i, wave in enumerate(waves)
    ]
    return pack(rows, task.view.attend.plan)


def some_batch(task, seconds=(0.5, 0.9, 1.4, 0.7), **more):
    return batch_of(task, [sound(one, seed=i) for i, one in enumerate(seconds)], **more)


# ---- the quantizer ----


def theirs_of(groups, codes=12, size=8, features=10):
    config = transformers.Wav2Vec2Config(
        num_codevector_groups=groups, num_codevectors_per_group=codes, codevector_dim=size, conv_dim=[features] * 7
    )
    return Wav2Vec2GumbelVectorQuantizer(config)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_quantizer_equals_transformers(groups, training):
    torch.manual_seed(0)
    ours, theirs = GumbelCodes(10, 12, 8, groups=groups).train(training), theirs_of(groups).train(training)
    with torch.no_grad():
        theirs.weight_proj.load_state_dict(ours.score.state_dict())
        theirs.weight_proj.weight.mul_(0.3)  # so that noise decides now and then
        ours.score.weight.mul_(0.3)
        theirs.codevectors.copy_(ours.vector_GVc.flatten(0, 1)[None])
    draw = Draw.micro_batch(0, 0, 7, 0)
    theirs.temperature = ours.temperature.at(7)
    f_ME = torch.randn(50, 10)
    chosen = ours(f_ME, draw)
    torch.manual_seed(draw.hash("gumbel"))
    vector_1MC, used = theirs(f_ME[None])
    torch.testing.assert_close(chosen.vector_MC, vector_1MC[0], atol=1e-6, rtol=1e-6)
    share_GV = chosen.mean_share() if training else chosen.choice_MGV.mean(0)
    torch.testing.assert_close(perplexity(share_GV), used, atol=1e-6, rtol=1e-6)
    assert torch.equal(chosen.code_MG.flatten(), _codes_of(theirs, vector_1MC[0], groups))
    highest_MG = ours.score(f_ME).view(50, groups, 12).argmax(2)
    assert (chosen.code_MG == highest_MG).float().mean() < 0.9 if training else torch.equal(chosen.code_MG, highest_MG)
    if training:
        (chosen.vector_MC.square().sum() - perplexity(share_GV)).backward()
        (vector_1MC.square().sum() - used).backward()
        torch.testing.assert_close(ours.score.weight.grad, theirs.weight_proj.weight.grad, atol=1e-5, rtol=1e-5)
        theirs_grad = theirs.codevectors.grad[0].view_as(ours.vector_GVc)
        torch.testing.assert_close(ours.vector_GVc.grad, theirs_grad, atol=1e-5, rtol=1e-5)


def _codes_of(theirs, vector_MC, groups):
    book_GVc = theirs.codevectors[0].unflatten(0, (groups, -1))
    part_MGc = vector_MC.unflatten(1, (groups, -1))
    return (part_MGc[:, :, None] - book_GVc[None]).square().sum(3).argmin(2).flatten()


def test_the_temperature_falls_with_the_step_alone():
    ramp = GumbelCodes(4, 4, 4).temperature
    assert ramp.at(0) == 2.0 and ramp.at(1) == 2.0 * 0.999995
    assert ramp.at(200_000) == pytest.approx(2 * math.exp(200_000 * math.log(0.999995)))
    assert ramp.at(600_000) == ramp.at(10**9) == 0.1
    with pytest.raises(ValueError, match=r"wanted 0 < last <= first and 0 < factor <= 1, got .*factor=1\.1"):
        ExponentialRamp(first=2.0, last=0.1, factor=1.1)
    torch.manual_seed(0)
    book, f_ME = (
        GumbelCodes(10, 12, 8, temperature=ExponentialRamp(first=2.0, last=0.1, factor=0.5)),
        torch.randn(9, 10),
    )
    early, late = (book(f_ME, Draw("", 0, step, ("same",))) for step in (0, 3))
    assert torch.equal(early.code_MG, late.code_MG)
    grads = [torch.autograd.grad(one.vector_MC.sum(), book.score.weight)[0].abs().sum() for one in (early, late)]
    assert grads[0] != grads[1]
    assert not [name for name, _ in book.named_buffers()]  # nothing to be carried on


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="got 8 codes, 10 values and 3 groups"):
        GumbelCodes(4, 8, 10, groups=3)


# ---- the losses ----


def with_other_codes(others, code_MG, row_M):
    """Distractors of a token's own code replaced by others of its row. (Theirs does not always know them in training:
    the choice is 1 but for rounding then.)"""
    index_MK = others.index_MK.clone()
    for m, names in enumerate(index_MK.tolist()):
        good = [k for k in range(len(row_M)) if row_M[k] == row_M[m] and (code_MG[k] != code_MG[m]).any()]
        index_MK[m] = torch.tensor([k if k in good else good[place % len(good)] for place, k in enumerate(names)])
    return Others(index_MK, others.none_M)


@pytest.mark.parametrize("training", [True, False])
def test_contrast_and_diversity_equal_transformers_with_every_gradient(training):
    torch.manual_seed(0)
    groups, codes, rows, n = 2, 6, 3, 20
    no_dropout = dict.fromkeys(
        ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop",
         "feat_quantizer_dropout", "final_dropout"), 0.0
    )  # fmt: skip
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=[16],
        conv_kernel=[10], conv_stride=[5], num_codevector_groups=groups, num_codevectors_per_group=codes,
        codevector_dim=8, proj_codevector_dim=12, feat_extract_norm="layer", **no_dropout,
    )  # fmt: skip
    theirs = Wav2Vec2ForPreTraining(config).train(training)
    hidden_Bn = torch.rand(rows, n) < 0.5
    hidden_Bn[2] = False
    hidden_Bn[2, [3, 9]] = True
    row_M, place_M = hidden_Bn.nonzero().unbind(1)
    wave_BT = torch.randn(rows, 10 + 5 * (n - 1))

    speech = Speech(FbankReader(), width=32)
    net = Network({"speech": speech}, conformer_encoder(32, 1, 2))
    book = GumbelCodes(16, codes, 8, groups=groups)
    ours = OwnCodes(net, "span", book, tap=1, width=32, compare=12, distractors=7, predict=0.0)
    ours.state_to.load_state_dict(theirs.project_hid.state_dict())
    ours.code_to.load_state_dict(theirs.project_q.state_dict())
    with torch.no_grad():
        theirs.quantizer.weight_proj.weight.mul_(0.5)
        theirs.quantizer.codevectors.copy_(book.vector_GVc.flatten(0, 1)[None])
    book.score.load_state_dict(theirs.quantizer.weight_proj.state_dict())
    seen = {}
    theirs.quantizer.register_forward_pre_hook(lambda m, given: seen.update(f=given[0], rng=torch.get_rng_state()))
    theirs.wav2vec2.register_forward_hook(lambda m, given, made: seen.update(state=made[0]))

    def run(others):
        """Their outcome, and ours from the same states and features and with the same noise."""
        negatives = torch.zeros(rows, n, 7, dtype=torch.int64)
        negatives[row_M, place_M] = (row_M * n + place_M)[others.index_MK]
        torch.manual_seed(3)
        made = theirs(wave_BT, mask_time_indices=hidden_Bn, sampled_negative_indices=negatives)
        torch.set_rng_state(seen["rng"])
        score_NV = book.score(seen["f"]).view(-1, codes)
        choice_NV = F.one_hot(score_NV.argmax(1), codes).float()
        if training:
            choice_NV = F.gumbel_softmax(score_NV, tau=2, hard=True)
        choice_MGV, share_MGV = (
            one.view(rows, n, groups, codes)[hidden_Bn] for one in (choice_NV, score_NV.softmax(1))
        )
        vector_MC = torch.einsum("mgv,gvc->mgc", choice_MGV, book.vector_GVc).flatten(1)
        return made, Chosen(vector_MC, choice_MGV, share_MGV if training else choice_MGV)

    others = Others.drawn(row_M, rows, 7, DRAW)
    if training:
        others = with_other_codes(others, run(others)[1].code_MG, row_M)
    made, chosen = run(others)
    score_Mk = ours.scores(seen["state"][hidden_Bn], chosen, row_M, others, rows, n)
    assert torch.isinf(score_Mk).any() != training and torch.isfinite(score_Mk[:, 0]).all()
    contrast = F.cross_entropy(score_Mk, torch.zeros_like(row_M), reduction="sum")
    diversity = (1 - perplexity(chosen.mean_share()) / (groups * codes)) * len(row_M)
    torch.testing.assert_close(contrast, made.contrastive_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(diversity, made.diversity_loss, atol=1e-5, rtol=1e-5)

    pairs = [(theirs.project_hid.weight, ours.state_to.weight), (theirs.project_q.weight, ours.code_to.weight)]
    pairs += [(theirs.quantizer.weight_proj.weight, book.score.weight)] if training else []
    pairs += [(one, one) for one in theirs.wav2vec2.encoder.parameters()]
    wanted = torch.autograd.grad(made.loss, [one for one, _ in pairs], retain_graph=True)
    got = torch.autograd.grad(contrast + 0.1 * diversity, [one for _, one in pairs])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5 * max(1.0, float(other.abs().max())), rtol=1e-4)


def test_the_objectives_terms_are_those_of_its_parts():
    objective = (task := some_recipe().stages[0].tasks[0]).objective
    batch = some_batch(task)
    picked = batch.picked["span"]
    loss = objective(batch, DRAW)
    terms = {term.name: term for term in loss.terms}
    assert {name: term.weight for name, term in terms.items()} == {"contrast": 1.0, "diversity": 0.1, "predict": 1.0}
    chosen = objective.coded(batch, DRAW)
    states = objective.net(batch, read=[1])
    at_M = batch.layout.at("speech", picked.seen_M)
    row_M = batch.layout.row_N[at_M]
    others = Others.drawn(row_M, 4, 8, DRAW)
    contrast = 0.0
    state_MW, code_MW = objective.state_to(states.layer[1][at_M]), objective.code_to(chosen.vector_MC)
    for m in range(len(picked)):
        names = [m, *(k for k in others.index_MK[m].tolist() if (chosen.code_MG[k] != chosen.code_MG[m]).any())]
        scores = F.cosine_similarity(state_MW[m][None], code_MW[names], dim=1) / 0.1
        contrast += scores.logsumexp(0) - scores[0]
    torch.testing.assert_close(terms["contrast"].sum, contrast, atol=1e-3, rtol=1e-5)
    predict = F.cross_entropy(objective.head(states.last[at_M]), chosen.code_MG[:, 0], reduction="sum")
    torch.testing.assert_close(terms["predict"].sum, predict, atol=1e-3, rtol=1e-5)
    share_V = objective.book.score(task.objective.net.modalities["speech"].features(batch.clean["speech"]))
    share_V = share_V[picked.clean_M].softmax(1).mean(0)
    diversity = (1 - torch.special.entr(share_V).sum().exp() / 16) * len(picked)
    torch.testing.assert_close(terms["diversity"].sum, diversity, atol=1e-4, rtol=1e-5)
    assert all(term.per == "picked:span" for term in loss.terms)


def test_codes_learn_from_the_contrast_alone_unless_they_are_told_to():
    for through in (False, True):
        objective = (task := some_recipe(through=through).stages[0].tasks[0]).objective
        loss = objective(some_batch(task), DRAW)
        predict = next(term for term in loss.terms if term.name == "predict")
        predict.sum.backward(retain_graph=True)
        grad = objective.book.score.weight.grad
        assert (grad is not None and bool(grad.abs().sum() > 0)) == through
        assert all(p.grad is not None and p.grad.any() for p in objective.net.encoder.parameters())
        objective.zero_grad()
        contrast = next(term for term in loss.terms if term.name == "contrast")
        contrast.sum.backward()
        reached = [
            block for block in objective.net.encoder.blocks if any(p.grad is not None for p in block.parameters())
        ]
        assert reached == [objective.net.encoder.blocks[0]] and objective.book.vector_GVc.grad.any()


def test_a_task_of_weight_0_is_left_out():
    for numbers, left in (({"contrast": 0.0}, {"diversity", "predict"}), ({"predict": 0.0}, {"diversity", "contrast"})):
        objective = (task := some_recipe(**numbers).stages[0].tasks[0]).objective
        loss = objective(some_batch(task), DRAW)
        assert {term.name for term in loss.terms} == left
        assert all(torch.isfinite(term.sum) for term in loss.terms)
    unused = [name for name, _ in objective.named_parameters() if "head" in name]
    assert not unused


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (dict(depth=0), "the tap must be one of the layers 1 to 1, got 0"),
        (dict(compare=0), "states of width 32 and code vectors of 16 need `compare`"),
        (dict(distractors=0), "distractors must be at least 1 and kappa above 0, got 0 and 0.1"),
        (dict(contrast=0.0, predict=0.0), "contrast and predict are weights, not both 0, got 0.0 and 0.0"),
    ],
)
def test_what_cannot_be_is_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        some_recipe(**numbers)


# ---- masks, distractors, rows ----


def test_the_mask_takes_the_share_that_the_paper_implies():
    mask = some_recipe().stages[0].tasks[0].view.picks["span"]
    tokens = Tokens.of_row(torch.full((300,), -1))
    share_N = torch.zeros(300)
    for unit in range(10_000):
        share_N[mask(tokens, Draw.row(0, 0, 0, epoch=0, unit=unit))] += 1 / 10_000
    assert share_N[10:].mean() == pytest.approx(0.489, abs=0.01) and 1 - (1 - 0.065) ** 10 == pytest.approx(
        0.489, abs=1e-3
    )
    assert share_N[0] == pytest.approx(0.065, abs=0.01)


def test_distractors_are_others_of_the_same_row_each_as_likely():
    row_M = torch.tensor([0] * 5 + [2] * 2 + [3])
    counts = torch.zeros(8, 8)
    for step in range(200):
        others = Others.drawn(row_M, 4, 10, Draw.micro_batch(0, 0, step, 0))
        counts.scatter_add_(1, others.index_MK, torch.ones(8, 10))
    assert others.none_M.tolist() == [False] * 7 + [True]
    share = counts[:5, :5] / counts[:5].sum(1, keepdim=True)
    assert not share.diagonal().any() and not counts[:5, 5:].any()
    assert (share[~torch.eye(5, dtype=torch.bool)] - 0.25).abs().max() < 0.04
    assert counts[5].argmax() == 6 and counts[6].argmax() == 5 and (counts[5:7] > 0).sum() == 2


def test_a_row_with_one_hidden_token_has_no_loss_and_breaks_nothing():
    objective = (task := some_recipe().stages[0].tasks[0]).objective
    batch = batch_of(task, [sound(0.05, seed=0)])
    assert len(batch.picked["span"]) <= 2
    chosen, row_M = objective.coded(batch, DRAW), torch.zeros(1, dtype=torch.int64)
    one = Chosen(chosen.vector_MC[:1], chosen.choice_MGV[:1], chosen.share_MGV[:1])
    others = Others.drawn(row_M, 1, 8, DRAW)
    score_Mk = objective.scores(torch.randn(1, 32, requires_grad=True), one, row_M, others, 1, 4)
    loss = F.cross_entropy(score_Mk, row_M, reduction="sum")
    (grad,) = torch.autograd.grad(loss, objective.code_to.weight)
    assert loss.item() == 0 and not grad.any() and torch.isfinite(grad).all()


@pytest.mark.parametrize(
    "numbers", [{}, dict(stack=4, channels=(4, 2), noise=0.1), dict(noise=0.1, causal=True)], ids=str
)
def test_a_changed_neighbour_changes_nothing(numbers):
    objective = (task := some_recipe(**numbers).stages[0].tasks[0]).objective.eval()
    waves = [sound(1.0, seed=i) for i in range(3)]
    louder = [waves[0], waves[1][::-1].copy(), waves[2]]
    told = []
    for some in (waves, louder):
        batch = batch_of(task, some)
        at_M = batch.layout.at("speech", batch.picked["span"].seen_M)
        row_M = batch.layout.row_N[at_M]
        torch.manual_seed(0)  # of the vectors that hide tokens
        tap_MD, last_MD = objective._states(batch, batch.picked["span"])
        chosen = objective.coded(batch, DRAW)
        others = Others.drawn(row_M, 3, 8, DRAW)
        score_Mk = objective.scores(tap_MD, chosen, row_M, others, 3, int(batch.layout.lengths_B.max()))
        told.append((row_M, tap_MD, last_MD, chosen.code_MG, score_Mk))
    row_M = told[0][0]
    for one, other in zip(*told, strict=True):
        torch.testing.assert_close(one[row_M != 1], other[row_M != 1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(told[0][1][row_M == 1], told[1][1][row_M == 1], atol=1e-3)
    assert (row_M[others.index_MK] == row_M[:, None]).all()


def test_what_is_hidden_shows_in_no_state():
    for numbers in ({}, dict(noise=0.1)):
        objective = (task := some_recipe(**numbers).stages[0].tasks[0]).objective.eval()
        batch = some_batch(task)
        picked = batch.picked["span"]
        tokens = batch.seen["speech"]
        frame_NE = tokens["frame"].clone()
        frame_NE[picked.clean_M] = torch.randn(len(picked), frame_NE.shape[1])
        made = []
        for one in (tokens, tokens.with_values(frame=frame_NE)):
            batch.seen["speech"] = one
            torch.manual_seed(0)
            made.append(objective.net(batch))
        assert torch.equal(*made)


def test_the_tap_does_not_depend_on_later_layers():
    objective = (task := some_recipe(more_depth=2).stages[0].tasks[0]).objective.eval()
    batch = some_batch(task)
    before = objective(batch, DRAW)
    torch.manual_seed(0)
    tap_MD, last_MD = objective._states(batch, batch.picked["span"])
    for block in objective.net.encoder.blocks[1:]:
        for parameter in block.parameters():
            nn.init.normal_(parameter)
    torch.manual_seed(0)
    again_MD, other_MD = objective._states(batch, batch.picked["span"])
    assert torch.equal(tap_MD, again_MD) and not torch.allclose(last_MD, other_MD, atol=0.1)
    assert len(before.terms) == 3


# ---- sizes, learning, runs ----


@pytest.mark.parametrize(("scale", "billions"), [("base", 0.6), ("xxl", 1.0), ("v2", 0.6)])
def test_the_papers_scales_have_the_papers_parameters(scale, billions):
    with torch.device("meta"):
        recipe = w2v_bert(**scales[scale])
        theirs = transformers.Wav2Vec2BertModel(transformers.Wav2Vec2BertConfig())
    count = sum(p.numel() for p in recipe.network.parameters())
    assert round(count / 1e9, 1) == billions  # the papers tell one digit
    if scale == "v2":
        assert count == sum(p.numel() for p in theirs.parameters())
    else:  # a conformer layer of width 1,024: two feed-forwards, attention, convolution
        layer = 2 * 8 * 1024**2 + 4 * 1024**2 + 3 * 1024**2
        assert count == pytest.approx((12 + (12 if scale == "base" else 30)) * layer, rel=0.02)


def test_its_step_can_be_planned_without_a_device():
    flops = [plan("w2v_bert", **SMALL | dict(more_depth=more))["stages"][0]["flops"] for more in (1, 3)]
    assert 1.3 * flops[0] < flops[1] < 2.5 * flops[0]


def of_tones(count, seed):
    """Tones that change their pitch every 200 ms, among four."""
    rng, t = np.random.default_rng(seed), np.arange(16_000) / 16_000
    pitch = np.repeat(rng.choice([200, 500, 1200, 3000], (count, 5)), 3_200, axis=1)
    return [(0.4 * np.sin(2 * np.pi * one * t) + rng.normal(0, 0.01, 16_000)).astype(np.float32) for one in pitch]


def trained(count=40, **numbers):
    recipe = some_recipe(**dict(lr=3e-3, steps=count, warmup=5, span_ms=60.0, start=0.2) | numbers)
    stage, task = recipe.stages[0], recipe.stages[0].tasks[0]
    optimizer = stage.optimizer.build(recipe.module().named_parameters())
    told = []
    for step in range(count):
        set_learning_rate(optimizer, stage.optimizer.schedule, step)
        batch = batch_of(task, of_tones(8, step), epoch=step)
        torch.manual_seed(step)
        loss = task.objective(batch, Draw.micro_batch(0, 0, step, 0))
        optimizer.zero_grad()
        loss.total(batch.counts).backward()
        nn.utils.clip_grad_norm_(recipe.module().parameters(), 1.0)
        optimizer.step()
        count = len(batch.picked["span"])
        used, _ = loss.metrics["perplexity"]
        told.append({term.name: term.sum.item() / count for term in loss.terms} | {"codes": used.item() / count})
    return told


def test_it_learns():
    """Codes are told apart ever better; how well they are predicted says little while more of them come into use."""
    told = trained(60)
    first, last = ({name: sum(one[name] for one in some) / 5 for name in told[0]} for some in (told[:5], told[-5:]))
    assert last["contrast"] < 0.95 * first["contrast"]
    assert last["predict"] < 0.99 * math.log(16)


def test_codes_collapse_where_they_are_learned_from_being_predicted_alone():
    both, alone = (trained(120, **some) for some in ({}, {"contrast": 0.0, "through": True}))
    ours, theirs = (np.mean([one["codes"] for one in told[-10:]]) for told in (both, alone))
    assert theirs < 0.5 * ours
    assert np.mean([one["predict"] for one in alone[-10:]]) < np.mean([one["predict"] for one in both[-10:]])


def sounds_in(folder, count=12):
    for split in ("train", "valid"):
        with shard_writer(folder / split, prefix=split) as sink:
            for i in range(count):
                wave = sound(0.4 + 0.1 * (i % 4), seed=i)
                sink.write({"__key__": f"{i:02d}", "wav": encoded(wave, subtype="PCM_16")})
    return dict(data=(str(folder / "train"),), valid=(str(folder / "valid"),))


def test_a_run_that_is_taken_up_again_draws_the_same_codes(tmp_path):
    """Noise and temperature come from the step: what ends bit for bit alike had them alike."""
    shards, fast = sounds_in(tmp_path), SMALL | dict(cooling=0.5, noise=0.1)
    options = RunOptions(workers=0, log_every=1, save_every=3, keep=9, threads=1, exact=True)
    whole = mmpre.train("w2v_bert", out=tmp_path / "whole", options=options, **shards, **fast)
    cut = shutil.copytree(whole, tmp_path / "cut")
    for folder in cut.glob("checkpoints/*"):
        if not folder.name.endswith("00003"):
            shutil.rmtree(folder)
    assert mmpre.load(cut).checkpoint.step == 3
    mmpre.resume(cut)
    one, other = (mmpre.load(run).recipe.module().state_dict() for run in (whole, cut))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    losses = [[line.get("loss") for line in read_metrics(run / "metrics.jsonl")] for run in (whole, cut)]
    assert losses[0] == losses[1] and len(losses[0]) >= 8


def test_eval_tells_how_codes_are_used_and_how_well_they_are_told(tmp_path, capsys):
    run = mmpre.train("w2v_bert", out=tmp_path / "run", options=RunOptions(workers=0), **sounds_in(tmp_path), **SMALL)
    main(["eval", str(run), "--json"])
    told = json.loads(capsys.readouterr().out)
    results = {one["name"]: one for one in told["trained"]["results"]}
    soft, hard = results["codebook soft perplexity, share of 16"], results["codebook perplexity (of 16)"]
    right = results["hidden token's code told"]
    assert 1 / 16 <= soft["low"] <= soft["value"] <= min(1, soft["high"]) and soft["chance"] == 1 / 16
    assert (
        1 <= hard["low"] <= hard["value"] <= 16
        and hard["n"] == 12
        and 0 <= right["value"] <= 1
        and 1 / 16 < right["chance"] < 1
    )
    assert "predict_accuracy" in told["trained"]["tasks"]["w2v_bert"] and "untrained" in told


def test_a_collapsed_codebook_is_seen(tmp_path):
    task = some_recipe().stages[0].tasks[0]
    units = Units(ShardReader(open_shards(list(sounds_in(tmp_path)["valid"]))))
    spread = OwnCodesUse(task.objective.eval(), task.view).run(units, Processes())
    with torch.no_grad():
        task.objective.book.score.bias[3] = 1e4
    soft, hard, right = OwnCodesUse(task.objective, task.view).run(units, Processes())
    assert soft.value == pytest.approx(1 / 16) and hard.value == pytest.approx(1) and right.chance == 1
    assert spread[0].value > 0.2 and spread[1].value > 2


def test_the_claims_arms_are_recipes():
    found = find_recipe("w2v_bert")
    arms = {
        name: found.build(found.numbers("tiny", {**found.claim.quick, **arm.numbers}))
        for name, arm in found.claim.against.items()
    }
    own = found.build(found.numbers("tiny", found.claim.quick))
    weights = {name: recipe.stages[0].tasks[0].objective for name, recipe in arms.items()}
    assert weights["no contrast"].through
    assert weights["no contrast"].weights == {"contrast": 0.0, "diversity": 0.1, "predict": 1.0}
    alone = weights["contrast alone"]
    assert not alone.through and alone.weights == {"contrast": 1.0, "diversity": 0.1, "predict": 0.0}
    # as deep as ours, and every layer learns
    blocks = arms["contrast alone"].network.encoder.blocks
    assert len(blocks) == len(own.network.encoder.blocks)
    task = arms["contrast alone"].stages[0].tasks[0]
    batch = batch_of(task, of_tones(4, 0), epoch=0)
    alone(batch, Draw.micro_batch(0, 0, 0, 0)).total(batch.counts).backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in blocks.parameters())


@pytest.mark.parametrize("scale", ["tiny", "base", "v2"])
def test_spans_are_as_long_as_they_were_asked_for_in_milliseconds(scale):
    found = find_recipe("w2v_bert")
    numbers = dict(
        width=32, depth=1, more_depth=1, heads=2, codes=8, values=8, compare=8, channels=(), micro_batches=1, batch=2
    )
    for change, length in (({}, 10), ({"span_ms": 120.0}, 3 if scale == "base" else 6), ({"span_ms": 1.0}, 1)):
        recipe = found.build(found.numbers(scale, numbers | change))
        assert recipe.stages[0].tasks[0].view.picks["span"].length == length
    assert FbankReader(stack=2).token_ms == 20
    with pytest.raises(ValueError, match="wanted more than 0 ms, got 0"):
        FbankReader(stack=2).tokens_in(0)


@pytest.mark.parametrize("numbers", [{"compare": 8}, {"compare": 0, "values": 32}], ids=str)
def test_a_step_in_half_precision_costs_about_what_it_costs_in_full(numbers):
    task = some_recipe(**numbers).stages[0].tasks[0]
    batch, costs = some_batch(task), []
    for half in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = task.objective(batch, DRAW)
        loss.total(batch.counts).backward()
        costs.append(loss.total(batch.counts).item())
    assert costs[1] == pytest.approx(costs[0], rel=0.1)
    assert all(p.grad.isfinite().all() for p in task.objective.parameters() if p.grad is not None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_in_several_parts_can_be_planned(precision):
    told = plan("w2v_bert", options=PlanOptions(precision=precision), **SMALL | dict(micro_batches=2, batch=8))
    assert told["stages"][0]["flops"] > 0
