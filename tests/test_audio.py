import io
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from sounds import encoded, sample, sound

from mmpre.data.audio import Audio
from mmpre.data.sample import BadMember


def test_a_recording_at_the_wanted_rate_is_read_as_it_was_written():
    wave = sound(0.5)
    np.testing.assert_array_equal(Audio().wave(sample(wave)).numpy(), wave)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_every_kind_of_file_gives_the_same_sound(kind):
    wave = sound(1.0)
    read = Audio().wave(sample(wave, kind)).numpy()
    assert abs(len(read) - len(wave)) < 2_500, "mp3 adds some silence"
    tone = np.abs(np.fft.rfft(read[:16_000], 16_000))[:2_000]
    wanted = np.abs(np.fft.rfft(wave, 16_000))[:2_000]
    assert np.corrcoef(tone, wanted)[0, 1] > 0.95


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 22_050, 44_100, 48_000, 44_101, 16_001])
def test_other_rates_are_resampled_and_stereo_is_mixed(rate_hz):
    left, right = sound(0.5, rate_hz), sound(0.5, rate_hz, seed=1)
    read = Audio().wave(sample(encoded(np.stack([left, right], 1), rate_hz)))
    near = torchaudio.functional.resample(
        torch.from_numpy((left + right) / 2), round(rate_hz, -2 if rate_hz % 25 else 0), 16_000
    )
    assert len(read) == Audio().lengths(sample(encoded(np.stack([left, right], 1), rate_hz)))[0]
    n = min(len(read), len(near), 2_000)  # odd rates drift away from the round one, by a thousandth of a sample each
    assert abs(len(read) - 8_000) <= 1
    torch.testing.assert_close(read[:n], near[:n], atol=0.05 if rate_hz % 25 else 1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate_hz", [16_000, 22_050])
def test_windows_hold_every_sample_once_and_are_of_equal_length(kind, rate_hz):
    made = encoded(sound(3.3, rate_hz), rate_hz, kind)
    audio = Audio(seconds=0.7, windowed=True, rate_hz=rate_hz)
    lengths = audio.lengths(sample(made, kind))
    parts = [audio.wave(sample(made, kind, window)) for window in range(len(lengths))]
    assert [len(part) for part in parts] == lengths and len(parts) == 5
    assert max(lengths) - min(lengths) <= 1 and max(lengths) <= 0.7 * rate_hz
    whole = Audio(seconds=60, rate_hz=rate_hz).wave(sample(made, kind))
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=0)


def test_resampled_windows_have_the_lengths_that_were_announced():
    for samples in (9_999, 30_011, 44_100, 100_003):
        made = encoded(sound(samples / 44_100, 44_100), 44_100)
        audio = Audio(seconds=0.31, windowed=True)
        lengths = audio.lengths(sample(made))
        assert [len(audio.wave(sample(made, window=w))) for w in range(len(lengths))] == lengths


def test_without_windows_a_long_recording_is_cut_off():
    wave = sound(2.0)
    np.testing.assert_array_equal(Audio(seconds=0.5).wave(sample(wave)).numpy(), wave[:8_000])


def broken(kind="wav", subtype="PCM_16"):
    return bytearray(encoded(sound(1.0), kind=kind, subtype=subtype))


def header(place, code, value):
    data = broken()
    struct.pack_into(code, data, place, value)
    return bytes(data)


BAD = {
    "nothing": (b"", "broken audio"),
    "not audio": (b"this is a text, not a sound" * 9, "broken audio"),
    "no samples": (encoded(sound(0.0)), "empty audio"),
    "NaN": (encoded(np.full(9_000, np.nan, np.float32)), "audio out of range"),
    "infinity": (encoded(np.r_[sound(0.5), np.inf].astype(np.float32)), "audio out of range"),
    "huge": (encoded(sound(0.5) * 1e30), "audio out of range"),
    "eight channels": (encoded(np.zeros((900, 8), np.float32)), "too many channels"),
    "a rate of 1": (encoded(sound(0.5), 1), "sample rate out of range"),
    "a rate of 10 MHz": (encoded(sound(0.5), 10_000_000), "sample rate out of range"),
    "a size that is not there": (header(40, "<I", 10**8), "audio truncated"),
    "half a WAV": (bytes(broken()[:16_000]), "audio truncated"),
}


@pytest.mark.fault("B7")
@pytest.mark.parametrize("name", BAD)
def test_a_recording_that_cannot_be_used_costs_its_sample(name):
    data, cause = BAD[name]
    with pytest.raises(BadMember) as caught:
        Audio().wave(sample(data))
    assert (caught.value.cause, caught.value.member) == (cause, "wav")


@pytest.mark.fault("B7")
@pytest.mark.parametrize(("kind", "cause"), [("flac", "broken audio"), ("mp3", "audio truncated")])
def test_a_truncated_file_costs_the_windows_that_are_lost(kind, cause):
    made = bytes(broken(kind, None))
    audio = Audio(seconds=0.2, windowed=True)
    cut = made[: len(made) * 6 // 10]
    assert len(audio.lengths(sample(cut, kind))) in (5, 6)
    assert len(audio.wave(sample(cut, kind)))
    with pytest.raises(BadMember) as caught:
        audio.wave(sample(cut, kind, window=4))
    assert caught.value.cause in (cause, "audio truncated")


def test_a_wav_that_came_through_a_pipe_does_not_say_its_length_and_is_read():
    for size in (0xFFFFFFFF, 0x7FFFFFFF):
        assert len(Audio().wave(sample(header(40, "<I", size)))) == 16_000


def test_a_suffix_that_lies_is_told():
    with pytest.raises(BadMember, match="its content is FLAC, not WAV"):
        Audio().wave(sample(encoded(sound(), kind="flac"), "wav"))


@pytest.mark.fault("B7")
def test_a_header_that_announces_a_century_costs_no_memory():
    data = bytearray(encoded(sound(1.0), kind="flac"))
    place = data.index(b"fLaC") + 8 + 13  # the number of samples: 36 bits from the middle of this byte on
    data[place] |= 0x0F
    data[place + 1 : place + 5] = b"\xff" * 4
    assert soundfile.info(io.BytesIO(bytes(data))).frames == 2**36 - 1
    tracemalloc.start()
    with pytest.raises(BadMember) as caught:
        Audio(windowed=True).lengths(sample(bytes(data), "flac"))
    assert caught.value.cause == "audio too long"
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_damaged_bytes_raise_bad_member_and_nothing_else(kind):
    made = encoded(sound(0.3), kind=kind)
    rng = np.random.default_rng(0)
    bad = 0
    for _ in range(120):
        data = bytearray(made)
        for place in rng.integers(0, min(len(data), 400) if rng.random() < 0.5 else len(data), 3):
            data[place] = rng.integers(256)
        if rng.random() < 0.3:
            del data[rng.integers(len(data)) :]
        try:
            for window in range(min(3, len(Audio(seconds=0.1, windowed=True).lengths(sample(bytes(data), kind))))):
                wave = Audio(seconds=0.1, windowed=True).wave(sample(bytes(data), kind, window))
                assert wave.isfinite().all() and 0 < len(wave) <= 1_600
        except BadMember:
            bad += 1
    assert bad


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"seconds must lie in 0 to 86400, rate_hz in 4000 to 384000; got 0 s"):
        Audio(seconds=0)
    with pytest.raises(ValueError, match="suffixes must be among wav, flac, ogg, mp3, got aiff"):
        Audio(suffixes=("aiff", "wav"))
