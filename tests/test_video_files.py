"""Frames of video files: the same from every container and library, chosen as asked; and files that cannot be used."""

import io
import os
from importlib.util import find_spec

import av
import clips
import numpy as np
import pytest
import torch

from mmpre.data.sample import BadMember
from mmpre.data.video import Evenly, Rate, Segments, Video
from mmpre.data.video_file import UnusableVideo, read
from mmpre.draw import Draw

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
        cut = data[: int(len(data) * share)]
        with pytest.raises((UnusableVideo, RuntimeError)) as caught:
            read(cut, suffix=suffix, side_px=48, shares=[i / 8 for i in range(8)])
        told = caught.value.cause if isinstance(caught.value, UnusableVideo) else cause(cut, suffix)
        assert told in ("video truncated", "cannot be decoded")  # the latter where an mp4 has lost its index
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


def test_a_film_that_was_written_to_a_pipe_says_no_size_and_is_read():
    data = bytearray(FILMS["webm"])
    at = data.index(b"\x18\x53\x80\x67") + 4
    assert data[at] == 1  # eight bytes of size
    data[at : at + 8] = b"\x01" + b"\xff" * 7
    made = read(bytes(data), suffix="webm", side_px=48, shares=[0.0, 0.5], library="av")
    assert numbers(made) == numbers(read(FILMS["webm"], suffix="webm", side_px=48, shares=[0.0, 0.5]))


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


def changed(data, form, i, byte, change):
    """A film with one byte changed of the packet whose frame is shown as number i."""
    with av.open(io.BytesIO(data), format=form) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    packet = sorted(packets, key=lambda packet: packet.pts)[i]
    damaged, at = bytearray(data), data.index(bytes(packet)) + byte
    damaged[at] = change(damaged[at])
    return bytes(damaged)


@pytest.mark.fault("B8")
def test_pyav_tells_a_frame_that_the_decoder_leaves_out():
    hevc = clips.film(CLIP, "mp4", codec="libx265", coding={"x265-params": "log-level=none"})
    data = changed(hevc, "mov", 13, 4, lambda _: 38 << 1)  # filler, no picture
    for asked in (range(40), [13]):
        with pytest.raises(UnusableVideo, match=r"frame 1\d is left out by FFmpeg; write it again") as caught:
            read(data, suffix="mp4", side_px=48, shares=[i / 40 + 1e-6 for i in asked], library="av")
        assert caught.value.cause == "damaged video"
    data = changed(FILMS["avi"], "avi", 13, 5, lambda byte: byte & ~0x40)  # "not coded"
    with pytest.raises(UnusableVideo, match="frame 13 is left out by FFmpeg"):
        read(data, suffix="avi", side_px=48, shares=[13.1 / 40])
    made = read(data, suffix="avi", side_px=48, shares=[12.1 / 40, 14.1 / 40, 30.1 / 40])
    assert numbers(made) == [12, 14, 30], "what is after it is not shifted"


def test_a_frame_that_need_not_be_shown_is_the_one_before_it():
    vp8 = clips.film(CLIP, "webm", codec="libvpx")
    data = changed(vp8, "matroska", 13, 0, lambda byte: byte & ~0x10)
    made = read(data, suffix="webm", side_px=48, shares=[i / 40 + 1e-6 for i in (12, 13, 14)], library="av")
    assert numbers(made) == [12, 12, 14]


def test_key_frames_that_show_nothing_at_once_and_frames_of_one_time_are_read():
    rolling = clips.film(CLIP, "mp4", coding={"x264-params": "intra-refresh=1:keyint=10:bframes=0"})
    for i in (13, 14, 24):
        assert numbers(read(rolling, suffix="mp4", side_px=48, shares=[i / 40 + 1e-6], library="av")) == [i]
    fast = clips.film(CLIP, "mkv", rate=3000)  # of which the container knows the milliseconds
    made = read(fast, suffix="mkv", side_px=48, shares=[i / 40 for i in range(40)], library="av")
    assert len(made["frames"]) == 40 and len(set(made["times"])) == 14 and sorted(numbers(made)) == numbers(made)


@pytest.mark.fault("B5", "B8")
def test_other_files_are_refused_before_a_library_sees_them():
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    assert cause(playlist, "mp4") == "wrong type"
    assert cause(b"ffconcat version 1.0\nfile /etc/passwd\n", "mkv") == "wrong type"
    assert cause(FILMS["mp4"], "webm") == "wrong type"
    assert cause(FILES["gif"], "webp") == "wrong type"
    assert cause(b"", "mp4") == "wrong type"


@pytest.mark.fault("B8", "B9", "B11")
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
