"""VIOLET: what it hides and predicts, captions among others, its sizes, and that it learns."""

import math
import subprocess
import sys
import time

import clips
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from parity_text import AsUnits, some_batch, vary, word_tokenizer
from violets import DRAW, SMALL, batch_of, made, member, some, task_of

import mmpre
from mmpre.data.codes import WithCodes
from mmpre.data.derive import derive
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shard_writer import shard_writer
from mmpre.derivers import from_run
from mmpre.draw import Draw
from mmpre.evaluation.evaluate import evaluate
from mmpre.evaluation.hidden import HiddenTokens
from mmpre.evaluation.hidden_words import HiddenWords
from mmpre.masking.grid import Blocks
from mmpre.plan import plan
from mmpre.processes.processes import Processes
from mmpre.recipes.violet import scales, violet
from mmpre.runs.metrics import read_metrics
from mmpre.runs.options import RunOptions
from mmpre.tokens import Tokens
from mmpre.view import View


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    word_tokenizer().save(str(path))
    return str(path)


def test_codes_of_ordinary_tokens_stand_where_these_stand(tokenizer):
    reader = WithCodes(made(tokenizer).network.readers["video"], 12)
    codes = [i % 12 for i in range(16)]
    tokens = reader.tokenize(member(0, codes=[-1, *codes]), DRAW)
    expected = [part for i in range(4) for part in (-1, *codes[4 * i : 4 * i + 4])]
    assert tokens["code"].tolist() == expected
    with pytest.raises(BadMember, match="codes of"):
        reader.tokenize(member(0, codes=[-1, *codes, 3]), DRAW)
    made_up = Sample("a", "", "", reader.made())
    assert reader.tokenize(made_up, DRAW)["code"].tolist() == [-1, 0, 0, 0, 0] * 4


def grid_tokens(times, side):
    place = torch.cartesian_prod(torch.arange(times), torch.arange(side), torch.arange(side))
    return Tokens.of_row(torch.full((len(place),), -1), position=place)


@pytest.mark.parametrize(("times", "side", "share"), [(4, 7, 0.150), (1, 7, 0.081), (5, 7, 0.185), (4, 4, 0.119)])
def test_blocks_hide_the_measured_shares(times, side, share):
    tokens, mask = grid_tokens(times, side), Blocks(role="video")
    found = [len(mask(tokens, Draw.row(0, 0, 0, epoch=0, unit=i))) / len(tokens) for i in range(4000)]
    assert np.mean(found) == pytest.approx(share, abs=0.005)


def test_every_hidden_patch_is_black_before_the_swin_and_its_target_is_its_own_code(tokenizer):
    recipe, samples = made(tokenizer, attended=0.0), some(8)
    objective, video = task_of(recipe).objective, recipe.network.modalities["video"]
    batch = batch_of(recipe, samples)
    came = []
    handle = video.swin.register_forward_pre_hook(lambda module, args: came.append(args[0]))
    loss = objective(batch, DRAW)
    handle.remove()
    replaced, clean = batch.replaced["video"], batch.clean["video"]
    picked = batch.picked["patch"]
    assert torch.equal(replaced.nonzero().squeeze(1), picked.clean_M) and len(picked) > 8
    black, start = (-video.mean_3 / video.deviation_3), 0
    by_length = {}
    for length in clean.lengths_B.tolist():
        by_length.setdefault(length // 5, []).append((start, length))
        start += length
    for clip_bTHW3, (times, rows) in zip(came, sorted(by_length.items()), strict=True):
        assert clip_bTHW3.shape[:2] == (len(rows), times)
        for clip_THW3, (first, length) in zip(clip_bTHW3, rows, strict=True):
            for token in range(first, first + length):
                if clean.special_N[token] >= 0:
                    assert not replaced[token]
                    continue
                time, row, column = clean["position"][token].tolist()
                block = clip_THW3[time, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
                assert (block == black).all() == replaced[token], token
    term = next(one for one in loss.terms if one.name == "mvm")
    places = batch.layout.at("video", picked.seen_M)
    head = objective.readouts[1].head
    scores = head.scores(recipe.network(batch, at=places))
    plain = torch.nn.functional.cross_entropy(scores, clean["code"][picked.clean_M], reduction="sum")
    assert term.sum.item() == pytest.approx(plain.item(), rel=1e-5) and term.per == "picked:patch"
    by_key = {sample.key: sample for sample in samples}
    first_B = clean.lengths_B.cumsum(0) - clean.lengths_B
    for number, row in zip(picked.clean_M.tolist(), batch.layout.row_N[places].tolist(), strict=True):
        told = safetensors.torch.load(by_key[batch.keys[row]].members["derived.safetensors"])["codes"]
        frame, patch = divmod(number - int(first_B[row]), 5)
        assert clean["code"][number] == told[1 + 4 * frame + patch - 1]


def test_pixels_of_hidden_patches_are_predicted_without_codes(tokenizer):
    recipe = made(tokenizer, attended=0.0, predict="pixels")
    objective, samples = task_of(recipe).objective, some(8)
    for sample in samples:
        del sample.members["derived.safetensors"]
    batch = batch_of(recipe, samples)
    term = next(one for one in objective(batch, DRAW).terms if one.name == "mvm")
    picked = batch.picked["patch"]
    said_ME = objective.readouts[1].head.predict(recipe.network(batch, at=batch.layout.at("video", picked.seen_M)))
    true_ME = batch.clean["video"]["tubelet"][picked.clean_M] / 255
    assert len(picked) > 4 and said_ME.shape[1] == 3 * 32 * 32
    torch.testing.assert_close(term.sum, (said_ME - true_ME).abs().mean(1).sum())


def test_without_blocks_each_patch_is_hidden_by_itself(tokenizer):
    mask = task_of(made(tokenizer, blocks=False)).view.picks["patch"]
    tokens = grid_tokens(4, 7)
    taken_RN = torch.zeros(2000, len(tokens))
    for i in range(2000):
        taken_RN[i, mask(tokens, Draw.row(0, 0, 0, epoch=0, unit=i))] = 1
    patch_N = tokens.special_N < 0
    assert not taken_RN[:, ~patch_N].any() and taken_RN[:, patch_N].mean() == pytest.approx(0.15, abs=0.005)
    together = taken_RN[:, patch_N].T.corrcoef().fill_diagonal_(0)
    assert together.mean().abs() < 0.002  # blocks would make neighbours go together


def test_hidden_pixels_and_words_change_no_state_and_codes_are_of_the_clean_frame(tokenizer):
    recipe = made(tokenizer, attended=0.0)
    vary(recipe.module())
    net, samples = recipe.network, some(6)
    batch = batch_of(recipe, samples)
    tubelet, ids = batch.clean["video"]["tubelet"].clone(), batch.clean["text"]["ids"].clone()
    tubelet[batch.replaced["video"]] = 255 - tubelet[batch.replaced["video"]]
    ids[batch.replaced["text"]] = 9
    assert batch.replaced["text"].any()
    changed = {role: batch.seen[role].with_values(**{name: value})
               for role, name, value in (("video", "tubelet", tubelet), ("text", "ids", ids))}  # fmt: skip
    other = type(batch)(**{**batch.__dict__, "seen": changed})
    assert torch.equal(net(batch), net(other))
    plain = type(batch)(**{**batch.__dict__, "replaced": {r: torch.zeros_like(x) for r, x in batch.replaced.items()}})
    assert not torch.allclose(net(batch), net(plain))


def test_words_become_masks_always(tokenizer):
    recipe = made(tokenizer, attended=0.0)
    batches = [batch_of(recipe, some(6), epoch=epoch) for epoch in range(40)]
    picked = sum(len(batch.picked["word"]) for batch in batches)
    ordinary = sum(int((batch.clean["text"].special_N < 0).sum()) for batch in batches)
    assert picked / ordinary == pytest.approx(0.15, abs=0.03)
    for batch in batches:
        assert torch.equal(batch.replaced["text"].nonzero().squeeze(1), batch.picked["word"].clean_M)


def vtm_of(recipe):
    objective = task_of(recipe).objective
    return getattr(objective, "then", objective).again[0]


def test_equal_captions_cost_the_logarithm_of_the_options(tokenizer):
    recipe = made(tokenizer)
    vary(recipe.module())
    batch = some_batch(View(), recipe.network.readers, [member(i) for i in range(6)])
    loss = vtm_of(recipe)(recipe.network, recipe.network.embed(batch), batch, DRAW)
    assert loss.terms[0].sum.item() / 6 == pytest.approx(math.log(4), rel=1e-4)


def test_the_order_of_the_others_does_not_count_and_all_pairs_make_a_matrix(tokenizer, monkeypatch):
    recipe = made(tokenizer)
    vary(recipe.module())
    net, vtm, samples = recipe.network, vtm_of(recipe), some(5)
    batch = some_batch(View(), net.readers, samples)
    x_ND, options = net.embed(batch), vtm.choose(5, DRAW)
    before = vtm(net, x_ND, batch, DRAW).terms[0].sum
    turned = torch.cat([options[:, :1], options[:, 1:].flip(1)], 1)
    monkeypatch.setattr(vtm, "choose", lambda rows, draw: turned)
    torch.testing.assert_close(vtm(net, x_ND, batch, DRAW).terms[0].sum, before)
    pairs = torch.cartesian_prod(torch.arange(5), torch.arange(5))
    score_PP = vtm.between(net, batch)(pairs[:, 0], pairs[:, 1]).view(5, 5) / vtm.temperature
    expected = torch.nn.functional.cross_entropy(score_PP.gather(1, options), torch.zeros(5).long(), reduction="sum")
    torch.testing.assert_close(before, expected, rtol=1e-4, atol=1e-4)
    scored = recipe.evaluations[0].scores(samples, Processes.start())
    by_key = torch.tensor([int(key) for key in batch.keys])
    torch.testing.assert_close(scored[by_key][:, by_key].T, score_PP * vtm.temperature, atol=1e-5, rtol=0)


def test_the_base_scale_has_the_papers_sizes(tmp_path):
    word_tokenizer(30_522).save(str(tmp_path / "tokenizer.json"))
    with torch.device("meta"):
        recipe = violet(tokenizer=str(tmp_path))
        bert = transformers.BertForMaskedLM(transformers.BertConfig())
    objective, net = task_of(recipe).objective.then, recipe.network

    def millions(*modules):
        return sum(p.numel() for one in modules for p in one.parameters()) / 1e6

    text, video = net.modalities["text"], net.modalities["video"]
    assert millions(text, net.encoder) == pytest.approx(millions(bert.bert), rel=1e-6)
    own = 768 + 197 * 768 + 6 * 768 + 2 * 768  # [CLS], places, times, LayerNorm
    assert millions(video) == pytest.approx(millions(video.swin) + own / 1e6, rel=1e-6)
    words, patches = (readout.head for readout in objective.readouts)
    assert millions(words) == pytest.approx(millions(bert.cls), rel=1e-6)
    assert millions(patches) == pytest.approx((768 * 1536 + 1536 + 1536 * 8192 + 8192) / 1e6, rel=1e-6)
    assert millions(objective.again[0]) == pytest.approx((768 * 1536 + 1536 + 1536 + 1) / 1e6, rel=1e-6)
    # 49.5 of the Swin and BERT-base's 110, of which a pooler of 0.6 is not used
    assert millions(net) == pytest.approx(49.5 + 110, rel=0.02)


def test_every_parameter_gets_a_gradient(tokenizer):
    recipe = made(tokenizer)
    vary(recipe.module())
    objective = task_of(recipe).objective
    for epoch in range(3):
        batch = batch_of(recipe, some(8), epoch=epoch)
        objective(batch, Draw.micro_batch(0, 0, epoch, 0)).total(batch.counts).backward()
    without = [name for name, p in recipe.module().named_parameters() if p.grad is None or not p.grad.any()]
    # a softmax over options knows no bias of scores: its gradient is 0, or rounding
    assert [name for name in without if name != "tasks.violet.then.again.0.head.3.bias"] == []


def of_kinds(count, seed):
    """Clips whose ground, codes and caption say one of four kinds; what is hidden can be told from the rest."""
    made = []
    for i in range(count):
        kind = (seed + i) % 4
        clip = clips.frames(6, 64, 64, seed + i)
        clip[..., 1] = 60 * kind + 20
        made.append(member(i, codes=[-1, *[kind] * 16], words=" ".join([f"w{kind}"] * 5), clip=clip))
    return made


@pytest.mark.parametrize("parts", [{}, {"attended": 0.0, "blocks": False}, {"mvm": 0.0}, {"ordered": False}], ids=str)
def test_it_and_its_ablations_learn(parts, tokenizer):
    recipe = made(tokenizer, **parts)
    task, optimizer = task_of(recipe), torch.optim.AdamW(recipe.module().parameters(), lr=3e-3)
    losses, samples = [], of_kinds(8, 0)
    for step in range(40):
        batch = batch_of(recipe, samples, epoch=step)
        loss = task.objective(batch, Draw.micro_batch(0, 0, step, 0))
        total = loss.total(batch.counts)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    assert {term.name for term in loss.terms} == {"mlm", "mvm", "vtm"} - ({"mvm"} if "mvm" in parts else set())
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


def test_hidden_words_are_counted_right_where_the_head_says_them(tokenizer):
    recipe = made(tokenizer)
    hidden = recipe.evaluations[1]
    hidden = HiddenWords(hidden.network, hidden.head, hidden.readers, ("w1", "w2"))
    samples = AsUnits([member(0, words="w1 w2 w3"), member(1, words="w3 w1"), member(2, words="w11 w3")])
    with torch.no_grad():
        hidden.head.table.weight.zero_()
        hidden.head.bias.zero_()
        hidden.head.bias[6] = 1.0  # w1, behind five special tokens
        hidden.head.bias[8] = 2.0  # w3, which nobody asks for
    (result,) = hidden.run(samples, Processes.start())
    assert (result.value, result.n, result.chance) == (pytest.approx(2 / 3), 3, 0.5)
    for alone in ("w50",), ("w2",):  # none of them, or nothing to choose among
        assert not HiddenWords(hidden.network, hidden.head, hidden.readers, alone).run(samples, Processes.start())


def test_codes_of_hidden_patches_are_asked_of_held_out_clips_where_they_are_learned(tokenizer):
    recipe = made(tokenizer)
    (asked,) = [one for one in recipe.evaluations if isinstance(one, HiddenTokens)]
    with torch.no_grad():
        asked.head.table.weight.zero_()
        asked.head.bias[3] = 1.0  # of the codes 0 to 3, which two clips each are full of
    clean = [one.clean_M for one in _picked(asked, of_kinds(8, 0))]
    (result,) = asked.run(AsUnits(of_kinds(8, 0)), Processes.start())
    assert (result.name, result.value, result.n) == ("hidden patches' codes", 0.25, 8)
    by_kind = [sum(len(clean[i]) for i in (kind, kind + 4)) for kind in range(4)]
    assert result.chance == pytest.approx(max(by_kind) / sum(by_kind)) and min(map(len, clean)) > 0
    assert not any(isinstance(one, HiddenTokens) for one in made(tokenizer, mvm=0.0).evaluations)


def _picked(asked, samples):
    for number, sample in enumerate(samples):
        row = asked.view.row(sample, asked.network.readers, Draw.row(0, 0, 0, epoch=0, unit=number), None)
        assert torch.equal(row.replaced["video"].nonzero().squeeze(1), row.picked["patch"].clean_M)
        assert not row.replaced["text"].any()
        yield row.picked["patch"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for split, seed in (("train", 0), ("valid", 1)):
        with shard_writer(folder / split) as sink:
            for sample in of_kinds(16, seed):
                sink.write({"__key__": f"{split}{sample.key}", **sample.members})
    return folder


def losses(run):
    """What was written of each step's losses, of training and held-out ones."""
    kept = ("step", "loss", "losses", "metrics", "valid")
    return [{name: line[name] for name in kept if name in line} for line in read_metrics(run / "metrics.jsonl")]


def test_a_run_that_was_killed_goes_on_as_if_it_was_not(shards, tokenizer, tmp_path):
    numbers = SMALL | dict(data=[str(shards / "train")], valid=[str(shards / "valid")], tokenizer=tokenizer,
                           steps=9, valid_every=5, pool=6, words=("w1", "w2"), dropout=0.1, drop_path=0.2)  # fmt: skip
    how = dict(workers=0, log_every=1, save_every=2, threads=1, exact=True)
    mmpre.train("violet", out=tmp_path / "whole", options=RunOptions(**how), **numbers)
    code = f"import mmpre, mmpre.runs.options as o; mmpre.train('violet', out={str(tmp_path / 'cut')!r}, "
    code += f"options=o.RunOptions(**{how!r}), **{numbers!r})"
    process, metrics = subprocess.Popen([sys.executable, "-c", code]), tmp_path / "cut" / "metrics.jsonl"
    while not (metrics.exists() and any(line.get("step", 0) >= 5 for line in read_metrics(metrics))):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert mmpre.load(tmp_path / "cut").checkpoint.step < 9
    mmpre.resume(tmp_path / "cut", workers=1)
    one, other = (mmpre.load(tmp_path / name).recipe.module().state_dict() for name in ("whole", "cut"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert losses(tmp_path / "cut") == (whole := losses(tmp_path / "whole")) and len(whole) >= 9
    told = evaluate(tmp_path / "whole")
    names = [result["name"] for result in told["trained"]["results"]]
    assert any("text to video R@1" in name for name in names) and any("hidden words" in name for name in names)


def test_codes_of_a_codebook_that_was_learned_first_are_what_it_predicts(tokenizer, tmp_path):
    for split, seed in (("train", 0), ("valid", 1)):
        with shard_writer(tmp_path / split) as sink:
            for sample in of_kinds(16, seed):
                members = {name: one for name, one in sample.members.items() if name != "derived.safetensors"}
                sink.write({"__key__": f"{split}{sample.key}", **members})
    mmpre.train("visual_tokens", data=(str(tmp_path / "train"),), out=tmp_path / "codebook", clip=4, side_px=16,
                framing="whole", codes=12, values=8, width=32, depth=1, decoder_depth=1, heads=2, batch=8,
                micro_batches=1, steps=2, warmup=0, options=RunOptions(workers=0))  # fmt: skip
    for split in ("train", "valid"):
        derive([tmp_path / split], tmp_path / f"{split}-codes", from_run(tmp_path / "codebook"))
    numbers = SMALL | dict(steps=2, valid_every=1, pool=6, words=("w1", "w2"))
    mmpre.train("violet", out=tmp_path / "run", data=(str(tmp_path / "train"),), valid=(str(tmp_path / "valid"),),
                sidecar=str(tmp_path / "train-codes"), valid_sidecar=str(tmp_path / "valid-codes"),
                tokenizer=tokenizer, options=RunOptions(workers=0, log_every=1), **numbers)  # fmt: skip
    ledger = tmp_path / "run" / "ledger.jsonl"
    assert not ledger.exists() or not ledger.read_text()
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert any("mvm" in str(line) for line in lines) and any("valid" in line for line in lines)
    found = {one["name"]: one for one in evaluate(tmp_path / "run")["trained"]["results"]}
    assert found["hidden patches' codes"]["n"] == 16


def test_a_step_is_planned_without_data():
    small = {name: value for name, value in SMALL.items() if name not in ("steps", "codes")}
    told = plan("violet", steps=10, **small)
    assert told["stages"][0]["flops"] > 0


def test_scales_name_numbers_that_the_recipe_takes():
    for numbers in scales.values():
        with torch.device("meta"):
            recipe = violet(**numbers)
        assert len(recipe.network.encoder.blocks) == numbers.get("depth", 12)
