"""Frames of video files: the same from every container and library, chosen as asked; and the tokens made of them."""

import json
import os
import pickle
from importlib.util import find_spec

import clips
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mmpre.cli import main
from mmpre.data.sample import BadMember
from mmpre.data.shards import shard_writer
from mmpre.data.video import Evenly, Rate, Segments, Video
from mmpre.data.video_file import read
from mmpre.draw import Draw
from mmpre.encoder import bert_encoder
from mmpre.masking.corrupt import HideAll
from mmpre.masking.exact import ExactShare
from mmpre.masking.grid import Blocks, Tube
from mmpre.masking.random import RandomTokens
from mmpre.modalities.video import Learned, SinCos, VideoReader, VideoTubelets, clip, middle, random_crops
from mmpre.network import Network
from mmpre.show import WIDTH_PX
from mmpre.tokens import Tokens, pack
from mmpre.view import View

COUNT = 40
CLIP = clips.frames(COUNT)
FILMS = {suffix: clips.film(CLIP, suffix) for suffix in clips.CODECS}
FILES = FILMS | {suffix: clips.animation(CLIP, suffix) for suffix in ("webp", "gif")}


def row(unit=0, epoch=0):
    return Draw.row(0, 0, 0, epoch=epoch, unit=unit)


def numbers(made):
    return [clips.number(frame, COUNT) for frame in made["frames"]]


@pytest.mark.parametrize("suffix", FILES)
def test_a_clip_is_nearly_the_same_from_every_kind_of_file(suffix):
    made = read(FILES[suffix], suffix=suffix, side_px=48, shares=[0.0, 0.26, 0.51, 0.99])
    assert made["frames"].shape == (4, 48, 64, 3) and made["frames"].dtype == np.uint8
    assert np.abs(made["frames"].astype(int) - CLIP[[0, 10, 20, 39]]).mean() < (0.1 if suffix == "webp" else 2)
    np.testing.assert_allclose(made["times"], [0, 1, 2, 3.9], atol=1e-4)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize("gop", [1, 7, 100])
def test_decord_and_pyav_give_the_same_frames(suffix, gop):
    pytest.importorskip("decord")
    data = clips.film(CLIP, suffix, gop=gop)
    for asked in ({"shares": [0, 0.03, 0.3, 0.31, 0.9, 0.99]}, {"fps": 3.0, "count": 9, "start": 0.4}):
        ours, theirs = (read(data, suffix=suffix, side_px=48, library=one, **asked) for one in ("decord", "av"))
        assert np.array_equal(ours["frames"], theirs["frames"])
        np.testing.assert_allclose(ours["times"], theirs["times"], atol=1e-4)


@pytest.mark.parametrize("suffix", ["mp4", "avi", "webp", "gif"])
def test_frames_at_a_rate_start_where_they_are_asked_to(suffix):
    for start, expected in ((0.0, [0, 4, 8]), (0.5, [14, 18, 22]), (1.0, [28, 32, 36])):
        assert numbers(read(FILES[suffix], suffix=suffix, side_px=48, fps=2.5, count=3, start=start)) == expected
    assert numbers(read(FILES[suffix], suffix=suffix, side_px=48, fps=2, count=99, start=0.7)) == [*range(0, 40, 5)]


def test_a_rate_counts_the_time_and_not_the_frames():
    data = clips.animation(CLIP[:6], ms=[100, 900, 100, 100, 700, 100])
    made = read(data, suffix="webp", side_px=48, fps=2, count=4)
    assert [round(float(frame[-1, 0, 0])) for frame in made["frames"]] == [int(CLIP[i, -1, 0, 0]) for i in (0, 1, 2, 4)]
    np.testing.assert_allclose(made["times"], [0, 0.1, 1.0, 1.2])


def test_a_short_file_gives_each_of_its_frames_once():
    data = clips.animation(CLIP[:3])
    assert len(read(data, suffix="webp", side_px=48, shares=[i / 8 for i in range(8)])["frames"]) == 3
    assert len(read(data, suffix="webp", side_px=48, fps=1.0, count=8)["frames"]) == 1
    assert len(read(clips.animation(CLIP[:1]), suffix="webp", side_px=48, fps=1.0, count=8, start=1.0)["frames"]) == 1


def test_large_frames_are_made_smaller_in_their_proportions():
    frames = read(FILES["mp4"], suffix="mp4", side_px=24, shares=[0.5])["frames"]
    assert frames.shape == (1, 24, 32, 3)


def test_transparency_is_laid_on_white():
    clip_T = np.concatenate([CLIP[:3], np.full((3, 48, 64, 1), 255, np.uint8)], 3)
    clip_T[:, :10, :, 3] = 0
    frames = read(clips.animation(clip_T), suffix="webp", side_px=48, shares=[0, 0.5, 0.9])["frames"]
    assert (frames[:, :10] == 255).all() and np.array_equal(frames[:, 10:], CLIP[:3, 10:])


def test_evenly_takes_violets_frames_and_segments_the_middles_where_nothing_is_random():
    shares = Evenly(4).asked(row())["shares"]
    assert [int(100 * share) for share in shares] == [20, 40, 60, 80]  # floor(N / 5 * (i + 1))
    assert Segments(4, random=False).asked(row())["shares"] == [0.125, 0.375, 0.625, 0.875]
    assert Rate(2.0, 4, random=False).asked(row()) == {"fps": 2.0, "count": 4, "start": 0.5}


def test_random_segments_and_starts_are_uniform_and_come_from_the_rows_draw():
    drawn_RS = np.array([Segments(4).asked(row(unit))["shares"] for unit in range(2_000)])
    within_RS = drawn_RS * 4 - np.arange(4)
    assert within_RS.min() >= 0 and within_RS.max() < 1
    np.testing.assert_allclose(within_RS.mean(0), 0.5, atol=0.03)
    np.testing.assert_allclose(np.corrcoef(within_RS.T) - np.eye(4), 0, atol=0.08)
    starts = [Rate(1.0, 2).asked(row(unit))["start"] for unit in range(2_000)]
    np.testing.assert_allclose(np.histogram(starts, 4, (0, 1))[0] / 500, 1, atol=0.2)
    assert Segments(4).asked(row(3)) == Segments(4).asked(row(3)) != Segments(4).asked(row(3, epoch=1))


def test_sampling_refuses_what_it_cannot_do():
    for make in (lambda: Evenly(0), lambda: Segments(-1), lambda: Rate(1.0, 0)):
        with pytest.raises(ValueError, match="count must be at least 1 frame, got"):
            make()
    with pytest.raises(ValueError, match="fps must lie in 0 to 1000 frames a second, got 0"):
        Rate(0.0, 4)
    with pytest.raises(ValueError, match=r"suffixes must be among mp4, .*, got ts"):
        Video(suffixes=("ts",))


# ---- files that cannot be used ----


def cause(data, suffix, **more):
    with pytest.raises(BadMember) as caught:
        Video(sampling=Evenly(8), **more).frames(clips.sample(data, suffix), row())
    assert caught.value.member == suffix and caught.value.detail
    return caught.value.cause


@pytest.fixture(scope="module")
def fast_start(tmp_path_factory):
    """What the web has: the index first, so a file that ends early can still be opened."""
    return clips.film(CLIP, "mp4", folder=tmp_path_factory.mktemp("films"), movflags="faststart")


@pytest.mark.fault("B8")
@pytest.mark.parametrize("suffix", [*FILES, "fast"])
def test_a_file_that_ends_early_is_told_wherever_it_is_cut(suffix, fast_start):
    data, suffix = (fast_start, "mp4") if suffix == "fast" else (FILES[suffix], suffix)
    for share in (0.02, 0.2, 0.5, 0.8, 0.9, 0.97, 0.999):
        with pytest.raises(Exception, match=r".") as caught:
            read(data[: int(len(data) * share)], suffix=suffix, side_px=48, shares=[i / 8 for i in range(8)])
        assert getattr(caught.value, "cause", "") in ("video truncated", "damaged video", "wrong type", "")
    assert cause(data[: len(data) * 9 // 10], suffix) == "video truncated"
    read(data, suffix=suffix, side_px=48, shares=[0.5])


@pytest.mark.fault("B8")
@pytest.mark.parametrize("suffix", ["mkv", "webm"])
def test_libraries_would_take_a_file_that_ends_early_for_a_shorter_one(suffix, monkeypatch):
    """Why sizes are compared: without that, nothing tells that frames are missing."""
    monkeypatch.setattr("mmpre.data.video_file._check_whole", lambda form, data: None)
    data = FILMS[suffix][: len(FILMS[suffix]) * 9 // 10]
    for library in ("av", "decord") if find_spec("decord") else ("av",):
        frames = read(data, suffix=suffix, side_px=48, shares=[i / 40 for i in range(40)], library=library)["frames"]
        assert 20 < len(frames) < COUNT


@pytest.mark.fault("B8")
def test_pyav_tells_damage_within_a_frame():
    data, told = FILMS["mp4"], 0
    at = data.index(b"mdat") + 4
    for i in range(8):
        damaged = bytearray(data)
        damaged[at + 900 + 300 * i : at + 930 + 300 * i] = os.urandom(30)
        try:
            read(bytes(damaged), suffix="mp4", side_px=48, shares=[j / 40 for j in range(40)], library="av")
        except Exception:
            told += 1
    assert told >= 6


@pytest.mark.fault("B8")
def test_other_files_are_refused_before_a_library_sees_them():
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    assert cause(playlist, "mp4") == "wrong type"
    assert cause(b"ffconcat version 1.0\nfile /etc/passwd\n", "mkv") == "wrong type"
    assert cause(FILMS["mp4"], "webm") == "wrong type"
    assert cause(FILES["gif"], "webp") == "wrong type"
    assert cause(b"", "mp4") == "wrong type"


@pytest.mark.fault("B8")
def test_a_file_that_wants_too_much_costs_its_sample_alone():
    huge = clips.animation(np.zeros((1, 6_000, 6_000, 3), np.uint8), "gif")
    wide = huge[:6] + (60_000).to_bytes(2, "little") * 2 + huge[10:]
    assert cause(wide, "gif") == "video too large"
    assert cause(huge, "gif", max_bytes=96 << 20) == "decoder out of memory"
    video = Video(sampling=Evenly(8), seconds=0.005)
    with pytest.raises(BadMember) as caught:
        video.frames(clips.sample(clips.animation(np.repeat(CLIP, 20, 0)), "webp"), row())
    assert caught.value.cause == "decoder hangs"


def test_a_decoder_is_neither_shared_with_a_fork_nor_ended_by_it():
    video = Video(sampling=Evenly(2))
    one = clips.sample(FILES["webp"], "webp")
    expected = video.frames(one, row())
    child = os.fork()
    if child == 0:
        same = torch.equal(video.frames(one, row()), expected)
        video._decoder.close()
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(video.frames(one, row()), expected) and video._decoder.started == 1


# ---- tokens ----


def reader(**more):
    return VideoReader(Video(sampling=Evenly(4)), **{"patch_px": 16, "frames": 2} | more)


def test_a_clip_becomes_its_tubelets_behind_cls_and_can_be_put_together_again():
    video = reader()
    tokens = video.tokenize(clips.sample(FILES["webp"], "webp"), row())
    assert tokens.special_N.tolist() == [0] + [-1] * (2 * 3 * 4)
    assert tokens["position"][1:].tolist() == [[t, y, x] for t in range(2) for y in range(3) for x in range(4)]
    frames = video.video.frames(clips.sample(FILES["webp"], "webp"), row().child("frames"))
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
        wrong.tokenize(clips.sample(FILES["webp"], "webp"), row())
    with pytest.raises(ValueError, match="multiple of 8"):
        SinCos(12, 4)
    small = VideoTubelets(reader(), width=8, places=Learned(8, 2, 2, 4))
    with pytest.raises(ValueError, match=r"reach to 2 x 2 x 4 \(time, rows, columns\), a clip has 2 x 3 x 4"):
        embedded(small, [reader().tokenize(clips.sample(FILES["webp"], "webp"), row())])


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
    one = clips.sample(FILES["webp"], "webp")
    expected = VideoReader(Video(sampling=Segments(4, random=False)), 16, 2, middle(32)).tokenize(one, row())
    assert torch.equal(plain.tokenize(one, row(5))["tubelet"], expected["tubelet"])
    assert Rate(2.0, 3).still() == Rate(2.0, 3, random=False) and Evenly(2).still() == Evenly(2)


def test_a_row_is_shown_as_the_first_frames_of_its_tubelets_with_hidden_ones_grey():
    video, one = reader(), clips.sample(FILES["webp"], "webp")
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
