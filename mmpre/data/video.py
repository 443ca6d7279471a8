"""Video members as frames: which ones a row takes, and a decoder in a process of its own that takes them.

Members are data that nobody vouches for: a file that hangs, crashes, lies about its size or ends early raises
BadMember, which costs its sample alone.
"""
# T frames that are taken; H, W their sides

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from jaxtyping import UInt8
from torch import Tensor

from mmpre.data.decoder import Decoder
from mmpre.data.sample import Sample
from mmpre.data.video_file import FORMATS, read
from mmpre.draw import Draw


class Sampling(Protocol):
    """Says which frames a row takes, as `video_file.read` wants to hear it; `count` is the most that it takes.

    `still` is the same without chance.
    """

    count: int

    def asked(self, draw: Draw) -> Mapping[str, object]: ...

    def still(self) -> "Sampling": ...


@dataclass(frozen=True)
class Evenly:
    """`count` frames, evenly spaced, neither the first nor the last: frame floor(n (i + 1) / (count + 1)).

    As VIOLET (Fu et al. 2021, arXiv:2111.12681) takes them. Nothing is random.
    """

    count: int

    def __post_init__(self) -> None:
        _check_count("Evenly", self.count)

    def asked(self, draw: Draw) -> Mapping[str, object]:
        return {"shares": [(i + 1) / (self.count + 1) for i in range(self.count)]}

    def still(self) -> "Evenly":
        return self


@dataclass(frozen=True)
class Segments:
    """One frame of each of `count` equal parts: a random one, or, where not `random` (evaluation), the middle one.

    As temporal segment networks (Wang et al. 2016, arXiv:1608.00859) take them.
    """

    count: int
    random: bool = True

    def __post_init__(self) -> None:
        _check_count("Segments", self.count)

    def asked(self, draw: Draw) -> Mapping[str, object]:
        chances = [draw.uniform("segment", i) if self.random else 0.5 for i in range(self.count)]
        return {"shares": [(i + chance) / self.count for i, chance in enumerate(chances)]}

    def still(self) -> "Segments":
        return replace(self, random=False)


@dataclass(frozen=True)
class Rate:
    """At most `count` frames at `fps`: from a random place on, or, where not `random` (evaluation), in the middle.

    A file that is shorter is taken from its beginning and gives fewer.
    """

    fps: float
    count: int
    random: bool = True

    def __post_init__(self) -> None:
        _check_count("Rate", self.count)
        if not 0 < self.fps <= 1000:
            raise ValueError(f"Rate: fps must lie in 0 to 1000 frames a second, got {self.fps}")

    def asked(self, draw: Draw) -> Mapping[str, object]:
        start = draw.uniform("start") if self.random else 0.5
        return {"fps": self.fps, "count": self.count, "start": start}

    def still(self) -> "Rate":
        return replace(self, random=False)


def _check_count(who: str, count: int) -> None:
    if count < 1:
        raise ValueError(f"{who}: count must be at least 1 frame, got {count}")


@dataclass(frozen=True, kw_only=True)
class Video:
    """Decodes MP4, MOV, WebM, MKV, AVI, animated WebP and GIF, and still pictures as clips of one frame.

    `sampling` says which frames; none is taken twice, so a file with too few gives what it has. Frames whose shorter
    side is above `side_px` are made smaller. A file gets `seconds`, its decoder `max_bytes` of memory.
    Files are read by decord where it is installed (their frames are PyAV's, bit for bit), AVI and elsewhere by PyAV,
    animations by Pillow. Marks that say how to turn or stretch what was filmed are not followed.
    A member that cannot be used raises BadMember.
    """

    sampling: Sampling = field(default_factory=lambda: Segments(8))
    side_px: int = 256
    seconds: float = 30.0
    max_bytes: int = 2 << 30
    suffixes: tuple[str, ...] = tuple(FORMATS)

    def __post_init__(self) -> None:
        if self.side_px < 1:
            raise ValueError(f"Video: side_px must be at least 1, got {self.side_px}")
        if unknown := set(self.suffixes) - set(FORMATS):
            raise ValueError(f"Video: suffixes must be among {', '.join(FORMATS)}, got {', '.join(sorted(unknown))}")
        decoder = Decoder(read, seconds=self.seconds, max_bytes=self.max_bytes, recycle_bytes=self.max_bytes // 2)
        object.__setattr__(self, "_decoder", decoder)

    def frames(self, sample: Sample, draw: Draw) -> UInt8[Tensor, "T H W 3"]:
        suffix, data = sample.bytes(self.suffixes)
        made = self._decoder(data, suffix, suffix=suffix, side_px=self.side_px, **self.sampling.asked(draw))
        return torch.tensor(made["frames"])
