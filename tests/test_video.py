"""Clips as tubelets: packed, hidden, shown, put together again."""

import json
import pickle

import clips
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mmpre.batch import pack
from mmpre.command_line.cli import main
from mmpre.data.shards import shard_writer
from mmpre.data.video import Evenly, Rate, Segments, Video
from mmpre.draw import Draw
from mmpre.encoder import bert_encoder
from mmpre.masking.corrupt import HideAll
from mmpre.masking.exact import ExactShare
from mmpre.masking.grid import Blocks, Tube
from mmpre.masking.random import RandomTokens
from mmpre.modalities.video import Learned, SinCos, VideoReader, VideoTubelets, clip, middle, random_crops
from mmpre.network import Network
from mmpre.show import WIDTH_PX
from mmpre.tokens import Tokens
from mmpre.view import View

CLIP = clips.frames(40)
WEBP = clips.sample(clips.animation(CLIP), "webp")


def row(unit=0, epoch=0):
    return Draw.row(0, 0, 0, epoch=epoch, unit=unit)


def reader(**more):
    return VideoReader(Video(sampling=Evenly(4)), **{"patch_px": 16, "frames": 2} | more)


def test_a_clip_becomes_its_tubelets_behind_cls_and_can_be_put_together_again():
    video = reader()
    tokens = video.tokenize(WEBP, row())
    assert tokens.special_N.tolist() == [0] + [-1] * (2 * 3 * 4)
    assert tokens["position"][1:].tolist() == [[t, y, x] for t in range(2) for y in range(3) for x in range(4)]
    frames = video.video.frames(WEBP, row().child("frames"))
    assert torch.equal(clip(tokens["tubelet"][1:], 3, 4, 2), frames)
    first = tokens["tubelet"][1 + 4 + 2].view(2, 16, 16, 3)  # row 1, column 2
    assert torch.equal(first, frames[:2, 16:32, 32:48])


def test_one_frame_a_tubelet_gives_patches_and_odd_frames_are_left_out_or_filled():
    short = clips.sample(clips.animation(CLIP[:3]), "webp")
    assert reader(frames=1).tokenize(short, row())["position"][-1].tolist() == [2, 2, 3]
    assert reader(frames=2).tokenize(short, row())["position"][-1].tolist() == [0, 2, 3]
    filled = clip(reader(frames=4).tokenize(short, row())["tubelet"][1:], 3, 4, 4)
    assert torch.equal(filled, torch.from_numpy(CLIP[[0, 1, 2, 2]]))


def test_all_frames_are_cut_alike():
    brighter = np.repeat(CLIP[5:6], 4, 0).clip(60, 180) + np.arange(4, dtype=np.uint8)[:, None, None, None]
    still = clips.sample(clips.animation(brighter), "webp")
    video = reader(transform=random_crops(32, flip=True), frames=1)
    for unit in range(4):
        cut = clip(video.tokenize(still, row(unit))["tubelet"][1:], 2, 2, 1).int()
        for t in range(1, 4):
            assert (cut[t] - cut[0] - t).abs().max() <= 1
    drawn = {video.tokenize(still, row(unit))["tubelet"].sum().item() for unit in range(4)}
    assert len(drawn) == 4
    assert len(reader(transform=middle(32)).tokenize(still, row())) == 1 + 2 * 4


def test_what_a_reader_refuses():
    with pytest.raises(ValueError, match="at least 1, got patch_px 0, frames 2"):
        reader(patch_px=0)
    wrong = reader(transform=lambda clip_T3HW: clip_T3HW / 255)
    with pytest.raises(TypeError, match=r"must return frames as bytes, \[T, 3, H, W\], got torch.float32"):
        wrong.tokenize(WEBP, row())
    with pytest.raises(ValueError, match="multiple of 8"):
        SinCos(12, 4)
    small = VideoTubelets(reader(), width=8, places=Learned(8, 2, 2, 4))
    with pytest.raises(ValueError, match=r"reach to 2 x 2 x 4 \(time, rows, columns\), a clip has 2 x 3 x 4"):
        embedded(small, [reader().tokenize(WEBP, row())])


def embedded(modality, rows):
    tokens = Tokens.pack(rows)
    return modality.embed(modality.features(tokens), tokens, torch.zeros(len(tokens), dtype=torch.bool))


def network(width=16, places=None):
    torch.manual_seed(0)
    net = Network({"video": VideoTubelets(reader(), width=width, places=places)}, bert_encoder(width, 2, 2))
    return net.eval()


def several():
    shapes = [(40, 48, 64, 0), (6, 32, 80, 1), (3, 64, 32, 2)]
    return [clips.sample(clips.animation(clips.frames(*shape)), "webp", str(i)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("places", [None, lambda: Learned(16, 2, 4, 5)])
def test_clips_of_any_size_and_length_packed_are_encoded_as_each_alone(places):
    net, view = network(places=places and places()), View()
    made = [view.row(one, net.readers, row(i), None) for i, one in enumerate(several())]
    together = pack(made, view.attend.plan)
    states = net(together).split(together.layout.lengths_B.tolist())
    for key, state in zip(together.keys, states, strict=True):
        alone = next(one for one in made if one.key == key)
        torch.testing.assert_close(state, net(pack([alone], view.attend.plan)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "mask",
    [Tube(role="video", inside=ExactShare(role="video", share=0.4)), Blocks(role="video"),
     RandomTokens(role="video", rate=0.4)],
)  # fmt: skip
def test_hidden_tubelets_pixels_reach_no_state(mask):
    net, view = network(), View(picks={"it": mask}, corruption=HideAll())
    made = view.row(several()[0], net.readers, row(), None)
    batch = pack([made], view.attend.plan)
    hidden_M = batch.picked["it"].clean_M
    assert 0 < len(hidden_M) < len(made.seen["video"])
    pixels = made.seen["video"]["tubelet"].clone()
    pixels[hidden_M] = 255 - pixels[hidden_M]
    other = made.seen | {"video": made.seen["video"].with_values(tubelet=pixels)}
    changed = pack([type(made)(**made.__dict__ | {"seen": other})], view.attend.plan)
    assert torch.equal(net(batch), net(changed))
    if isinstance(mask, Tube):
        position = made.clean["video"]["position"][hidden_M]
        places = [set(map(tuple, position[position[:, 0] == t, 1:].tolist())) for t in range(2)]
        assert places[0] == places[1] and len(places[0]) == round(0.4 * 12)


def test_positions_tell_time_row_and_column_apart():
    tokens = reader().tokenize(several()[0], row())
    place_ND = SinCos(16, 8)(tokens)
    assert not place_ND[0].any() and len(place_ND[1:].unique(dim=0)) == 24
    assert torch.equal(place_ND[1, :8], place_ND[12, :8]) and not torch.equal(place_ND[1, :8], place_ND[13, :8])


def test_a_reader_can_be_sent_to_workers():
    again = pickle.loads(pickle.dumps(reader()))
    one = several()[1]
    assert torch.equal(again.tokenize(one, row())["tubelet"], reader().tokenize(one, row())["tubelet"])
    assert isinstance(VideoTubelets(again, width=8), nn.Module)


def test_without_chance_a_reader_takes_the_middle_of_frames_and_pictures():
    plain = VideoReader(Video(sampling=Segments(4)), 16, 2, random_crops(32)).still()
    assert plain.video.sampling == Segments(4, random=False)
    one = WEBP
    expected = VideoReader(Video(sampling=Segments(4, random=False)), 16, 2, middle(32)).tokenize(one, row())
    assert torch.equal(plain.tokenize(one, row(5))["tubelet"], expected["tubelet"])
    assert Rate(2.0, 3).still() == Rate(2.0, 3, random=False) and Evenly(2).still() == Evenly(2)


def test_a_row_is_shown_as_the_first_frames_of_its_tubelets_with_hidden_ones_grey():
    video, one = reader(), WEBP
    tokens = video.tokenize(one, row())
    hidden_N = torch.zeros(len(tokens), dtype=torch.bool)
    hidden_N[1 + 12 + 5] = True  # second tubelet, row 1, column 1
    shown = np.asarray(video.show(tokens, hidden_N))
    times = WIDTH_PX // (2 * 68)
    assert shown.shape == (48 * times, 2 * 68 * times, 3)
    frames = shown[::times, ::times].reshape(48, 2, 68, 3).transpose(1, 0, 2, 3)[:, :, :64]
    assert (frames[1, 16:32, 16:32] == 128).all() and not (frames[0, 16:32, 16:32] == 128).all()
    whole = clip(tokens["tubelet"][1:], 3, 4, 2).numpy()
    assert np.array_equal(frames[0], whole[0]) and np.array_equal(frames[1, :16], whole[2, :16])
    modality = VideoTubelets(video, width=8)
    again = modality.restored(tokens, modality.features(tokens))
    assert torch.equal(again["tubelet"], tokens["tubelet"])


def test_the_command_line_draws_what_a_tube_hides(tmp_path, capsys):
    with shard_writer(tmp_path / "clips") as sink:
        for i in range(2):
            sink.write({"__key__": f"c{i}", "webp": clips.animation(clips.frames(12, 60, 80, i))})
    main(["data", "inspect", str(tmp_path / "clips"), "--modality", "video", "--picture", str(tmp_path / "it.png"),
          "--mask", "Tube(inside=ExactShare(share=0.5))", "--json"])  # fmt: skip
    told = json.loads(capsys.readouterr().out)
    assert [one["hidden"] / one["ordinary"] for one in told["shown"]] == [pytest.approx(0.5, abs=0.02)] * 2
    assert Image.open(tmp_path / "it.png").width >= WIDTH_PX // 2
