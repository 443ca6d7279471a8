"""VIOLET: its Swin against transformers', what it hides and predicts, captions among others, and that it learns."""

import io
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
from parity_text import some_batch, vary, word_tokenizer
from PIL import Image

import mmpre
from mmpre.attention import Causal, Full
from mmpre.attention.backends import attention_probabilities, attention_received, received
from mmpre.attention.bias import ALiBi
from mmpre.data.codes import WithCodes
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shard_writer import shard_writer
from mmpre.draw import Draw
from mmpre.evaluation.evaluate import evaluate
from mmpre.evaluation.hidden_words import HiddenWords
from mmpre.masking.grid import Blocks
from mmpre.modalities.video import Padded, VideoReader
from mmpre.modalities.video_swin import Swin, VideoSwin, apart_Vnn, distance_rows
from mmpre.plan import plan
from mmpre.processes.processes import Processes
from mmpre.recipes.violet import scales, violet
from mmpre.runs.metrics import read_metrics
from mmpre.runs.options import RunOptions
from mmpre.testing import check_modality
from mmpre.tokens import Layout, Tokens
from mmpre.view import View

DRAW = Draw.micro_batch(0, 0, 0, 0)
SMALL = dict(
    channels=4, depths=(1, 1, 1, 1), swin_heads=(1, 1, 2, 2), window=(4, 2, 2), drop_path=0.0, depth=2, heads=2,
    side_px=64, codes=12, batch=8, micro_batches=1, steps=10, length=12, positions=12, dropout=0.0, places=5, lr=2e-3,
)  # fmt: skip
GRID = 4  # patches of a frame of 64 pixels


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    word_tokenizer().save(str(path))
    return str(path)


def member(key, count=6, words="w1 w2 w3 w4 w5", codes=None, frames=4, grid=GRID, side_px=64, **changed):
    """A clip of `count` frames of noise, a caption, and a code for each patch of `frames` frames."""
    rng = np.random.default_rng(int(key))
    clip = changed.get("clip", rng.integers(0, 255, (count, side_px, side_px, 3), dtype=np.uint8))
    taken = min(count, frames)
    codes = [-1, *(int(c) for c in rng.integers(0, 12, taken * grid))] if codes is None else codes
    told = {"codes": torch.tensor(codes, dtype=torch.int32), "lengths": torch.tensor([len(codes)])}
    members = {
        "webp": clips.animation(clip),
        "txt": words.encode(),
        "derived.safetensors": safetensors.torch.save(told),
    }
    return Sample(f"{key}", "shard", "digest", members)


def some(count=6):
    """Clips of 1 to 6 frames, with captions of 2 to 7 words."""
    return [member(i, 1 + i % 6, " ".join(f"w{(3 * i + j) % 60}" for j in range(2 + i % 6))) for i in range(count)]


def made(tokenizer, seed=0, **numbers):
    torch.manual_seed(seed)
    return violet(tokenizer=tokenizer, **SMALL | numbers)


def task_of(recipe):
    return recipe.stages[0].tasks[0]


def batch_of(recipe, samples, **more):
    task = task_of(recipe)
    return some_batch(task.view, task.objective.readers, samples, **more)


# ---- the Swin ----


def theirs_of(side_px):
    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=side_px, embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 2, 2, 4], window_size=7, drop_path_rate=0.0
    )
    model = transformers.SwinModel(config, add_pooling_layer=False).eval()
    vary(model)
    return model


@torch.no_grad()
def copy_swin(ours, theirs):
    """Weights of a Swin for pictures: the slice of the first frame, and the distances of no time."""
    projection = theirs.embeddings.patch_embeddings.projection
    ours.project.weight.normal_()  # what reads the next frame, which is black
    ours.project.weight[:, :48] = projection.weight.permute(0, 2, 3, 1).flatten(1)
    ours.project.bias.copy_(projection.bias)
    pairs = [(ours.norm, theirs.embeddings.norm), (ours.last, theirs.layernorm)]
    for i, (level, layer) in enumerate(zip(ours.levels, theirs.encoder.layers, strict=True)):
        if i < 3:
            pairs += [(ours.merges[i].norm, layer.downsample.norm), (ours.merges[i].reduce, layer.downsample.reduction)]
        for block, one in zip(level.blocks, layer.blocks, strict=True):
            attention = one.attention
            parts = attention.q_proj, attention.k_proj, attention.v_proj
            block.qkv.weight.copy_(torch.cat([part.weight for part in parts]))
            block.qkv.bias.copy_(torch.cat([part.bias for part in parts]))
            table = attention.relative_position_bias.relative_position_bias_table
            block.table_RA.normal_()
            block.table_RA[7 * 169 : 8 * 169] = table
            pairs += [(block.out, attention.o_proj), (block.up, one.mlp.fc1), (block.down, one.mlp.fc2),
                      (block.norm_attention, one.layernorm_before), (block.norm_mlp, one.layernorm_after)]  # fmt: skip
    for module, source in pairs:
        module.load_state_dict(source.state_dict())


@pytest.mark.parametrize("side_px", [224, 256])  # 64, 32 and 16 places are filled up to windows of 7
def test_one_frame_gives_the_states_of_transformers_swin(side_px):
    theirs = theirs_of(side_px)
    ours = Swin(side_px // 4, 8, (2, 2, 2, 2), (1, 2, 2, 4), (8, 7, 7), 0.0).eval()
    copy_swin(ours, theirs)
    frame_b3HW = torch.randn(2, 3, side_px, side_px)
    with torch.no_grad():
        expected = theirs(frame_b3HW).last_hidden_state
        got = ours(frame_b3HW.permute(0, 2, 3, 1)[:, None])
        torch.testing.assert_close(got.flatten(1, 3), expected, atol=2e-5, rtol=0)
        twice = ours(frame_b3HW.permute(0, 2, 3, 1)[:, None].expand(-1, 2, -1, -1, -1))
    assert (twice[:, :1] - got).abs().max() > 0.1, "a frame reads the next one"


def test_windows_read_as_the_dense_form_says():
    """Attention of moved windows, with zeros that fill them up, against one over all places of the clip."""
    torch.manual_seed(0)
    size, largest = (5, 6, 6), (4, 4, 4)
    swin = Swin(6, 8, (2,), (2,), largest, 0.0)
    block, x = swin.levels[0].blocks[1], torch.randn(1, *size, 8)
    vary(block)
    shift, full = (2, 2, 2), (8, 8, 8)
    got = block._attend(x, largest, shift, apart_Vnn(size, largest, shift, x.device))
    filled = torch.zeros(1, *full, 8)
    filled[:, :5, :6, :6] = x
    q, k, v = block.qkv(filled.flatten(1, 3)).view(512, 3, 2, 4).unbind(1)
    place = torch.cartesian_prod(*(torch.arange(8) for _ in range(3)))
    moved = (place - 2) % 8
    window = torch.where(place < 2, 2, (place - 2) // 4)  # what was rolled round has a window of its own
    cell, rolled = moved // 4, place < 2
    same = ((cell[:, None] == cell) & (rolled[:, None] == rolled)).all(-1)
    assert window.max() == 2
    offset = (moved[:, None] - moved).clamp(-3, 3) + 3
    bias = block.table_RA[(offset[..., 0] * 7 + offset[..., 1]) * 7 + offset[..., 2]]
    score = torch.einsum("nhk,mhk->nmh", q, k) / 2 + bias
    weight = score.masked_fill(~same[..., None], -torch.inf).softmax(1)
    y = torch.einsum("nmh,mhk->nhk", weight, v).flatten(1).view(1, *full, 8)[:, :5, :6, :6]
    torch.testing.assert_close(got, block.out(y), atol=1e-5, rtol=0)


def test_a_smaller_window_has_the_rows_of_its_own_distances():
    """The index of the largest window cut short would say another distance (as public code does)."""
    largest, window = (8, 7, 7), (4, 3, 3)
    row_nn = distance_rows(window, largest)
    place = torch.cartesian_prod(*(torch.arange(side) for side in window))
    unique = {}
    for i in range(len(place)):
        for j in range(len(place)):
            offset = tuple((place[i] - place[j]).tolist())
            assert unique.setdefault(offset, int(row_nn[i, j])) == row_nn[i, j]
    assert len(set(unique.values())) == len(unique) == 7 * 5 * 5
    assert unique[0, 0, 0] == 7 * 169 + 6 * 13 + 6
    cut = distance_rows(largest, largest)[: len(place), : len(place)]
    assert (cut == row_nn).float().mean() < 0.2
    time = distance_rows((4, 7, 7), largest)
    assert torch.equal(distance_rows(largest, largest)[: len(time), : len(time)], time)


def test_the_papers_swin_and_its_tiny_variant_have_the_stated_sizes():
    with torch.device("meta"):
        base = Swin(56, 96, (2, 2, 18, 2), (3, 6, 12, 24), (8, 7, 7), 0.2)
    assert sum(p.numel() for p in base.parameters()) / 1e6 == pytest.approx(49.5, abs=0.05)
    tiny = Swin(32, 16, (1, 1, 2, 1), (1, 2, 4, 8), (8, 4, 4), 0.0)
    assert sum(p.numel() for p in tiny.parameters()) / 1e6 == pytest.approx(0.4, abs=0.05)
    assert tiny(torch.rand(1, 4, 128, 128, 3)).shape == (1, 4, 4, 4, 128)


def test_half_of_the_clips_leave_a_block_out_and_others_are_scaled_up():
    torch.manual_seed(0)
    swin = Swin(2, 8, (2,), (2,), (2, 2, 2), 0.5).train()
    first, second = swin.levels[0].blocks
    assert (first.drop_path, second.drop_path) == (0.0, 0.5)
    y = second._kept(torch.ones(400, 1, 1, 1, 1)).flatten()
    assert set(y.unique().tolist()) == {0.0, 2.0} and y.mean().item() == pytest.approx(1.0, abs=0.15)
    assert torch.equal(second.eval()._kept(y), y)


# ---- clips as tokens ----


def test_a_clip_has_a_cls_and_a_grid_for_each_frame(tokenizer):
    reader = made(tokenizer).network.readers["video"]
    for count, frames in ((1, 1), (3, 3), (9, 4)):
        tokens = reader.tokenize(member(0, count), DRAW)
        assert tokens.special_N.tolist() == [0, -1, -1, -1, -1] * frames
        times = torch.arange(frames).repeat_interleave(5)
        assert torch.equal(tokens["position"][:, 0], times.int())
        assert tokens["position"][:, 1:].tolist() == [[0, 0], [0, 0], [0, 1], [1, 0], [1, 1]] * frames
    plain = VideoReader(reader.video, 32, 1, Padded(64), max_patches=4).tokenize(member(0, 9), DRAW)
    assert torch.equal(tokens["tubelet"][tokens.special_N < 0], plain["tubelet"][1:])


def test_the_papers_clips_have_50_places_a_frame():
    with torch.device("meta"):
        recipe = violet()
    reader = recipe.network.readers["video"]
    for count, places in ((1, 50), (9, 200)):
        clip = np.zeros((count, 30, 40, 3), np.uint8)
        clip[..., 0] = np.arange(count)[:, None, None] * 20 + 100
        assert len(reader.tokenize(member(0, clip=clip), DRAW)) == places


def test_frames_are_put_whole_into_a_black_square():
    clip = torch.full((2, 3, 20, 40), 200, dtype=torch.uint8)
    square = Padded(40)(clip)
    assert square.shape == (2, 3, 40, 40)
    assert (square[:, :, 12:28] == 200).all() and (square[:, :, :8] == 0).all() and (square[:, :, 32:] == 0).all()
    tall = Padded(20)(clip.mT)
    assert (tall[..., :3] == 0).all() and (tall[..., 8:12] > 150).all()


def test_it_keeps_what_every_modality_must(tokenizer):
    recipe = made(tokenizer)
    vary(recipe.module())
    check_modality(recipe.network.modalities["video"], some(4))


def test_rows_of_another_grid_and_wrong_patches_are_refused(tokenizer):
    video = made(tokenizer).network.modalities["video"]
    tokens = video.reader.tokenize(member(0), DRAW)
    odd = Tokens(tokens.special_N[:-1], torch.tensor([19]), {})
    nothing = torch.zeros(19, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"wanted up to 6 frames of a \[CLS\] and 2 x 2 patches a row, 5 tokens each"):
        video.embed(torch.zeros(19, 3072), odd, nothing)
    with pytest.raises(ValueError, match=r"4 levels read patches of 32 pixels.*got patches of 16"):
        VideoSwin(VideoReader(patch_px=16), grid=2)
    with pytest.raises(ValueError, match="heads for each level and a side that can be halved"):
        Swin(6, 8, (1, 1, 1), (1, 1, 1), (2, 2, 2), 0.0)


def test_a_sample_among_others_equals_the_sample_alone_and_changing_one_changes_no_other(tokenizer):
    recipe, samples = made(tokenizer), some()
    net = recipe.network
    vary(recipe.module())

    def states(samples):
        batch = some_batch(View(), net.readers, samples)
        parts = net(batch).split(batch.layout.lengths_B.tolist())
        return dict(zip(batch.keys, parts, strict=True))

    together = states(samples)
    for sample in samples:
        torch.testing.assert_close(together[sample.key], states([sample])[sample.key], atol=1e-5, rtol=0)
    other = states([member(0, 1, "w7 w8"), *samples[1:]])
    assert not torch.equal(other["0"], together["0"])
    assert all(torch.equal(other[sample.key], together[sample.key]) for sample in samples[1:])


def test_without_order_the_states_do_not_tell_which_frame_came_first(tokenizer):
    clip = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
    for ordered in (True, False):
        recipe = made(tokenizer, ordered=ordered)
        vary(recipe.module())
        net = recipe.network
        one, other = (
            net(some_batch(View(), net.readers, [member(0, 4, clip=frames)])) for frames in (clip, clip[::-1])
        )
        assert torch.allclose(one, other, atol=1e-5) != ordered


# ---- codes ----


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


# ---- what is hidden ----


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
    row = int(batch.layout.row_N[places[0]])
    told = safetensors.torch.load(by_key[batch.keys[row]].members["derived.safetensors"])["codes"]
    inside = int(picked.clean_M[0] - (clean.lengths_B.cumsum(0) - clean.lengths_B)[row])
    frame, patch = divmod(inside, 5)
    assert clean["code"][picked.clean_M[0]] == told[1 + 4 * frame + patch - 1]


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


# ---- attended masking ----


def test_what_is_received_is_the_sum_of_what_is_given():
    torch.manual_seed(0)
    layout = Layout({"text": torch.tensor([3, 5, 5, 9])})
    q_NHK, k_NHK = torch.randn(2, layout.size, 4, 8)
    for attend, bias in ((Full(), None), (Causal(), None), (Full(), ALiBi(4)), (Causal(), ALiBi(4))):
        plan_of = attend.plan(layout)
        rows = attention_probabilities(q_NHK, k_NHK, plan_of, bias)
        expected = torch.cat([weight_Hnn.mean(0).sum(0) for weight_Hnn in rows])
        torch.testing.assert_close(attention_received(q_NHK, k_NHK, plan_of, bias), expected)


def hidden_tokens(batch):
    """For each row, the numbers of its hidden tokens among all of its tokens."""
    place = torch.cat([batch.layout.at(one.role, one.clean_M) for one in batch.picked.values()]).sort().values
    row = batch.layout.row_N[place]
    return [(place[row == i] - batch.layout.starts_B[i]).tolist() for i in range(len(batch.layout))]


def test_attended_rows_hide_exact_counts_of_both_sides_and_no_special_token(tokenizer):
    recipe = made(tokenizer, attended=1.0)
    objective, batch = task_of(recipe).objective, batch_of(recipe, some(8))
    special_N = torch.cat([batch.clean[role].special_N for role in batch.layout.roles])[batch.layout.source_N]
    sides = set()
    for step in range(30):
        hidden = objective.hidden(batch, Draw.micro_batch(0, 0, step, 0))
        for row, some_n in enumerate(hidden_tokens(hidden)):
            assert len(some_n) == int(0.15 * int(batch.layout.lengths_B[row]))
        for one in hidden.picked.values():
            place = batch.layout.at(one.role, one.clean_M)
            assert (special_N[place] < 0).all()
            assert torch.equal(hidden.replaced[one.role].nonzero().squeeze(1), one.clean_M)
            sides |= {one.role} if len(one) else set()
    assert sides == {"video", "text"}
    one, other = (objective.hidden(batch, Draw.micro_batch(0, 0, 3, 0)).replaced for _ in range(2))
    assert all(torch.equal(one[role], other[role]) for role in one)


def test_tokens_are_hidden_in_proportion_to_the_attention_they_receive(tokenizer):
    recipe = made(tokenizer, attended=1.0)
    vary(recipe.module())
    objective, net = task_of(recipe).objective, recipe.network
    with torch.no_grad():
        for block in net.encoder.blocks:
            block.sublayers[0].sublayer.qkv.weight.mul_(4)  # so that some are read far more than others
    one = member(0, 1, "w1 w2 w3")  # 5 + 5 tokens: int(0.15 * 10) is one
    batch = batch_of(recipe, [Sample(f"{i}", "", "", one.members) for i in range(400)])
    with torch.no_grad(), received() as read:
        net(some_batch(View(), net.readers, [one]))
    assert len(read) == 2
    special = torch.cat([part.special_N for part in some_batch(View(), net.readers, [one]).clean.values()]) >= 0
    share = sum(read).masked_fill(special, 0.0)
    share = share / share.sum()
    times = torch.zeros(10)
    for step in range(8):
        hidden = hidden_tokens(objective.hidden(batch, Draw.micro_batch(0, 0, step, 0)))
        times += torch.bincount(torch.tensor(hidden).flatten(), minlength=10)
    assert share.max() > 1.3 * share[share > 0].min()
    assert (times / 3200 - share).abs().max() < 0.03


def test_half_of_the_rows_keep_their_blocks_and_losses_are_means_of_what_is_hidden(tokenizer):
    recipe = made(tokenizer)
    objective, batch = task_of(recipe).objective, batch_of(recipe, some(8))
    own, kept = hidden_tokens(batch), 0
    for step in range(40):
        hidden = hidden_tokens(objective.hidden(batch, Draw.micro_batch(0, 0, step, 0)))
        kept += sum(one == other for one, other in zip(own, hidden, strict=True))
    assert kept / 320 == pytest.approx(0.5, abs=0.1)
    hidden = objective.hidden(batch, DRAW)
    plain, loss = objective.then(hidden, DRAW), objective(batch, DRAW)
    for one, other in zip(plain.terms, loss.terms, strict=True):
        count = len(hidden.picked[{"mlm": "word", "mvm": "patch"}[one.name]]) if one.name != "vtm" else 8
        assert other.per == "rows"
        assert other.sum.item() / 8 == pytest.approx(one.sum.item() / max(count, 1), rel=1e-5)


def test_wrong_shares_are_refused(tokenizer):
    with pytest.raises(ValueError, match=r"share must lie between 0 and 1, rows in 0 to 1, got share 0\.15 and rows 2"):
        made(tokenizer, attended=2)


# ---- captions among others ----


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


# ---- the whole ----


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


@pytest.mark.parametrize("parts", [{}, {"attended": 0.0}, {"mvm": 0.0}, {"ordered": False}], ids=str)
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


class Few:
    """Units of some samples, as evaluations read them."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def sample(self, i):
        return self.samples[i]


def test_hidden_words_are_counted_right_where_the_head_says_them(tokenizer):
    recipe = made(tokenizer)
    hidden = recipe.evaluations[1]
    hidden = HiddenWords(hidden.network, hidden.head, hidden.readers, ("w1", "w2"))
    samples = Few([member(0, words="w1 w2 w3"), member(1, words="w3 w1"), member(2, words="w11 w3")])
    with torch.no_grad():
        hidden.head.table.weight.zero_()
        hidden.head.bias.zero_()
        hidden.head.bias[6] = 1.0  # w1, behind five special tokens
    (result,) = hidden.run(samples, Processes.start())
    assert (result.value, result.n, result.chance) == (pytest.approx(2 / 3), 3, 0.5)
    assert not HiddenWords(hidden.network, hidden.head, hidden.readers, ("w50",)).run(samples, Processes.start())


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for split, seed in (("train", 0), ("valid", 1)):
        with shard_writer(folder / split) as sink:
            for sample in of_kinds(16, seed):
                sink.write({"__key__": f"{split}{sample.key}", **sample.members})
    return folder


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
    told = evaluate(tmp_path / "whole")
    names = [result["name"] for result in told["trained"]["results"]]
    assert any("text to video R@1" in name for name in names) and any("hidden words" in name for name in names)


def test_a_step_is_planned_without_data():
    small = {name: value for name, value in SMALL.items() if name not in ("steps", "codes")}
    told = plan("violet", steps=10, **small)
    assert told["stages"][0]["flops"] > 0


def test_scales_name_numbers_that_the_recipe_takes():
    for numbers in scales.values():
        with torch.device("meta"):
            recipe = violet(**numbers)
        assert len(recipe.network.encoder.blocks) == numbers.get("depth", 12)


def picture(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, "WEBP")
    return file.getvalue()


def test_a_picture_is_a_clip_of_one_frame(tokenizer):
    reader = made(tokenizer).network.readers["video"]
    assert len(reader.tokenize(Sample("a", "", "", {"webp": picture(0)}), DRAW)) == 5
