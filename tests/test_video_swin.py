"""Video Swin against transformers' Swin, and clips as its tokens."""

import io

import numpy as np
import pytest
import torch
import transformers
from parity_text import some_batch, vary, word_tokenizer
from PIL import Image
from violets import DRAW, made, member, some

from mmpre.data.sample import Sample
from mmpre.modalities.video import Padded, VideoReader
from mmpre.modalities.video_swin import Swin, VideoSwin, apart_Vnn, distance_rows
from mmpre.recipes.violet import violet
from mmpre.testing import check_modality
from mmpre.tokens import Tokens
from mmpre.view import View


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "tokenizer.json"
    word_tokenizer().save(str(path))
    return str(path)


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
    y = tiny(torch.rand(1, 4, 128, 128, 3))
    assert y.shape == (1, 4, 4, 4, 128)
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in tiny.parameters())


def test_half_of_the_clips_leave_a_block_out_and_others_are_scaled_up():
    torch.manual_seed(0)
    swin = Swin(2, 8, (2,), (2,), (2, 2, 2), 0.5).train()
    first, second = swin.levels[0].blocks
    assert (first.drop_path, second.drop_path) == (0.0, 0.5)
    y = second._kept(torch.ones(400, 1, 1, 1, 1)).flatten()
    assert set(y.unique().tolist()) == {0.0, 2.0} and y.mean().item() == pytest.approx(1.0, abs=0.15)
    assert torch.equal(second.eval()._kept(y), y)


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


def picture(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, "WEBP")
    return file.getvalue()


def test_a_picture_is_a_clip_of_one_frame(tokenizer):
    reader = made(tokenizer).network.readers["video"]
    assert len(reader.tokenize(Sample("a", "", "", {"webp": picture(0)}), DRAW)) == 5
