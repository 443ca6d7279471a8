"""Audio members, decoded to one channel at one rate, whole or in windows.

Members are data that nobody vouches for: a header is looked at before anything is decoded, no more than a window is
held in memory, and a member that cannot be used raises BadMember.
"""
# T samples, C channels

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import soundfile
import torch
from jaxtyping import Float
from torch import Tensor
from torchaudio.transforms import Resample

from mmpre.data.sample import BadMember, Sample

FORMATS = {"wav": ("WAV", "WAVEX", "RF64"), "flac": ("FLAC",), "ogg": ("OGG",), "mp3": ("MP3", "MPEG")}
SEEKABLE = ("WAV", "WAVEX", "RF64", "FLAC")  # to the very sample
RATES_HZ = (4_000, 384_000)
MAX_SECONDS = 24 * 3600  # of a member; what its header says, whether it is true or not
LOUDEST = 2.0**24  # a sample, where 1 is full scale; files with samples as integers stay below it
BLOCK = 1 << 20  # samples that are decoded at once to be passed over
UNKNOWN_BYTES = 0x7FFF0000  # what writes to a pipe puts a size of this or more into a WAV's header


@dataclass(frozen=True, kw_only=True)
class Audio:
    """Decodes WAV, FLAC, Ogg and MP3 members of any rate, mono or stereo, to one channel at `rate_hz`.

    A recording longer than `seconds` is cut off, or, where `windowed`, becomes the fewest windows of equal length that
    hold all of it once. No more than a window is held in memory. Ogg and MP3 are decoded from their start for each
    window (libsndfile's seeking is not exact in them), so long recordings are better kept as FLAC.
    A member that cannot be decoded, that ends before its header says, or that holds no sound raises BadMember.
    """

    seconds: float = 15.0
    windowed: bool = False
    rate_hz: int = 16_000
    suffixes: tuple[str, ...] = tuple(FORMATS)

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= MAX_SECONDS or not RATES_HZ[0] <= self.rate_hz <= RATES_HZ[1]:
            raise ValueError(
                f"Audio: seconds must lie in 0 to {MAX_SECONDS}, rate_hz in {RATES_HZ[0]} to {RATES_HZ[1]}; "
                f"got {self.seconds} s and {self.rate_hz} Hz"
            )
        if unknown := set(self.suffixes) - set(FORMATS):
            raise ValueError(f"Audio: suffixes must be among {', '.join(FORMATS)}, got {', '.join(sorted(unknown))}")

    @property
    def digest(self) -> str:
        return f"audio {self.rate_hz} {self.seconds} {self.windowed} {'|'.join(self.suffixes)}"

    def lengths(self, sample: Sample) -> list[int]:
        """Samples at `rate_hz` in each window of a recording, from its header alone."""
        with self._opened(sample) as (_, file):
            ratio = self._ratio(file)
            return [_resampled(last - first, ratio) for first, last in self._bounds(file)]

    def wave(self, sample: Sample) -> Float[Tensor, "T"]:
        """The samples of one window, full scale being 1."""
        with self._opened(sample) as (suffix, file):
            first, last = self._bounds(file)[sample.window]
            if file.format in SEEKABLE:
                file.seek(first)
            else:
                for passed in range(0, first, BLOCK):
                    file.read(min(BLOCK, first - passed), dtype="float32")
            wave_TC = torch.from_numpy(file.read(last - first, dtype="float32", always_2d=True))
            if len(wave_TC) < last - first:
                got = f"sample {first + len(wave_TC):,} is the last of {file.frames:,} that its header announces"
                raise BadMember("audio truncated", suffix, got)
            wave_T = wave_TC.mean(1)
            if not wave_T.abs().max() <= LOUDEST:  # NaN is not
                raise BadMember("audio out of range", suffix, f"holds NaN, infinity or more than {LOUDEST:.0f}")
            ratio = self._ratio(file)
        if ratio != 1:
            wave_T = _resampler(ratio.numerator, ratio.denominator)(wave_T)[: _resampled(len(wave_T), ratio)]
        return wave_T

    @contextmanager
    def _opened(self, sample: Sample) -> Iterator[tuple[str, soundfile.SoundFile]]:
        suffix, data = sample.bytes(self.suffixes)
        try:
            with _Forward(io.BytesIO(data)) as file:
                _check_header(suffix, file)
                yield suffix, file
        except (soundfile.SoundFileError, OverflowError) as e:
            raise BadMember("broken audio", suffix, f"cannot be decoded ({str(e)[:200]}); write it again") from None

    def _bounds(self, file: soundfile.SoundFile) -> list[tuple[int, int]]:
        most = max(1, int(self.seconds * file.samplerate))
        if not self.windowed:
            return [(0, min(most, file.frames))]
        count = -(-file.frames // most)
        return [(file.frames * i // count, file.frames * (i + 1) // count) for i in range(count)]

    def _ratio(self, file: soundfile.SoundFile) -> Fraction:
        # An odd rate is taken for one within a millionth of it, or the filter would be gigabytes large.
        return Fraction(file.samplerate, self.rate_hz).limit_denominator(640)


class _Forward(soundfile.SoundFile):
    """A file that goes on reading where it is: soundfile seeks after each read where it can, which costs exactness."""

    def seekable(self) -> bool:
        return False


def _check_header(suffix: str, file: soundfile.SoundFile) -> None:
    if file.format not in FORMATS[suffix]:
        told = f"its content is {file.format}, not {FORMATS[suffix][0]}; give it the suffix that it is"
        raise BadMember("wrong type", suffix, told)
    if file.channels > 2:
        raise BadMember("too many channels", suffix, f"mono or stereo is read, got {file.channels}; mix it down")
    if not RATES_HZ[0] <= file.samplerate <= RATES_HZ[1]:
        what = f"wanted {RATES_HZ[0]:,} to {RATES_HZ[1]:,} samples a second, its header says {file.samplerate:,}"
        raise BadMember("sample rate out of range", suffix, what)
    if file.frames > MAX_SECONDS * file.samplerate:
        hours = file.frames / file.samplerate / 3600
        raise BadMember("audio too long", suffix, f"{hours:,.0f} hours by its header; cut it to a day or less")
    if file.frames < 1:
        raise BadMember("empty audio", suffix, "there is no sound in it")
    sizes = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if sizes and int(sizes[2]) < int(sizes[1]) < UNKNOWN_BYTES:
        raise BadMember("audio truncated", suffix, f"{sizes[2]} of the {sizes[1]} bytes that its header announces")


def _resampled(samples: int, ratio: Fraction) -> int:
    return samples * ratio.denominator // ratio.numerator


@lru_cache(maxsize=16)
def _resampler(rate: int, wanted: int) -> Callable[[Tensor], Tensor]:
    return Resample(rate, wanted)
