"""Frames of one video file as arrays. It runs in the process that `decoder.py` starts, and imports what that needs.

Files are data that nobody vouches for. Which demultiplexer reads a file is decided here, by its first bytes: FFmpeg's
own guess could take a file for a playlist and open what that names. Files that end early are found by the sizes in
them: of some, decoders give the frames that are there as if they were all.
"""
# T frames that are taken, of n; H, W their sides

import io
import struct
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image

FORMATS = {
    "mp4": "mov", "m4v": "mov", "mov": "mov", "webm": "matroska", "mkv": "matroska", "avi": "avi",
    "webp": "WEBP", "gif": "GIF", "png": "PNG", "jpg": "JPEG", "jpeg": "JPEG",
}  # fmt: skip
MAX_PIXELS = 64 << 20  # of a frame
MAX_FRAMES = 1 << 20
_BOXES = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")  # what a QuickTime file may begin with
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_EXACT_S = 1e-3
_REORDERED = ("h264", "hevc")  # codecs that do not tell at the start whether frames will be reordered
# codecs whose packets of more than so many bytes each show a frame, which FFmpeg leaves out where it is damaged; not
# H.264, where a second field may be a packet but is no frame, and where damage is an error
_SHOWN, _AS_BEFORE = ("hevc", "vp9", "av1", "mpeg4"), 19
_UNTIMED_MS = 100  # how long browsers show a frame of a GIF that gives no time


class UnusableVideo(ValueError):
    """A video that is refused. `cause` is a short, countable name for why."""

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause


def read(
    data: bytes, *, suffix: str, side_px: int, shares: Sequence[float] = (), fps: float = 0.0, count: int = 0,
    start: float = 0.0, library: str | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """The frames that are asked for, [T, H, W, 3] as bytes, and their times, [T] in seconds.

    Asked for are frames at `shares` of the file's number of frames, or `count` frames at `fps`, `start` being the share
    of the time left that passes before the first. None is taken twice: a short file gives fewer. Transparency is laid
    on white. Frames whose shorter side is above `side_px` are made smaller (bicubic), in their own proportions.
    """
    form = _form(data, suffix)
    _check_whole(form, data)
    if form in ("mov", "matroska", "avi"):
        library = library or ("decord" if form != "avi" and find_spec("decord") else "av")
        file = {"decord": _Decord, "av": _Av}[library](data, form)
    else:
        file = _Pillow(data, form)
    if not file.count:
        raise UnusableVideo("empty video", "there is no frame in it")
    if file.count > MAX_FRAMES:
        raise UnusableVideo("video too long", f"{file.count:,} frames, at most {MAX_FRAMES:,} are read; cut it")
    index = _at_rate(file.times(), fps, count, start) if fps else [int(share * file.count) for share in shares]
    index = sorted({min(max(i, 0), file.count - 1) for i in index})
    found = [(_smaller(frame, side_px), time) for frame, time in file.frames(index)]
    if len(found) < len(index):
        what = f"{len(found)} of {len(index)} frames could be decoded"
        raise UnusableVideo("video truncated", f"{what}; write it again from its source")
    if len({frame.shape for frame, _ in found}) > 1:
        raise UnusableVideo("frames of several sizes", "its frames differ in size; write it again in one")
    return {"frames": np.stack([frame for frame, _ in found]), "times": np.array([time for _, time in found])}


def _at_rate(time_n: Sequence[float], fps: float, count: int, start: float) -> list[int]:
    """The frame that is shown at each time that is wanted; libraries' times differ by rounding."""
    last = time_n[-1] - time_n[0]
    length = last + last / max(1, len(time_n) - 1)  # the last frame lasts too
    first = start * max(0.0, length - count / fps)
    wanted = [first + i / fps for i in range(count)]
    wanted = [time for time in wanted if time < length - _EXACT_S] or [0.0]
    return [bisect_right(time_n, time_n[0] + time + _EXACT_S) - 1 for time in wanted]


def _smaller(frame_HW3: np.ndarray, side_px: int) -> np.ndarray:
    height, width = frame_HW3.shape[:2]
    shrink = side_px / min(height, width)
    if shrink >= 1:
        return frame_HW3
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    return np.asarray(Image.fromarray(frame_HW3).resize(size, Image.Resampling.BICUBIC))


class _Pillow:
    """Animations and still pictures."""

    def __init__(self, data: bytes, form: str) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                self.picture = Image.open(io.BytesIO(data), formats=[form])
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
            raise UnusableVideo("video too large", f"{e}; shrink it") from None
        _check_size(*self.picture.size)
        self.count = getattr(self.picture, "n_frames", 1)

    def times(self) -> list[float]:
        return [time for _, time in self._upto(self.count - 1)]

    def frames(self, index: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
        wanted = set(index)
        for i, (picture, time) in enumerate(self._upto(index[-1])):
            if i not in wanted:
                continue
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            yield np.asarray(picture.convert("RGB")), time

    def _upto(self, last: int) -> Iterator[tuple[Image.Image, float]]:
        """Frames and times; what lies before a frame is decoded anyway, and tells how long it is shown."""
        passed_ms = 0.0
        for i in range(last + 1):
            self.picture.seek(i)
            self.picture.load()
            yield self.picture, passed_ms / 1000
            passed_ms += self.picture.info.get("duration") or _UNTIMED_MS


class _Av:
    """PyAV. A frame that FFmpeg itself calls corrupt is refused, and so is one that it leaves out though it should not.

    What may be left out, such as a packet that says "as before", is shown as the frame before it.
    """

    def __init__(self, data: bytes, form: str) -> None:
        import av

        av.logging.set_level(av.logging.PANIC)
        self.container = av.open(io.BytesIO(data), format=form)
        if not self.container.streams.video:
            raise UnusableVideo("empty video", "there is no video in it, only sound or text")
        self.stream = self.container.streams.video[0]
        codec = self.stream.codec_context
        codec.thread_count = 1
        _check_size(codec.width, codec.height)
        packets = [p for p in self.container.demux(self.stream) if p.size and not p.is_discard]
        self.count, self.timed, name = len(packets), form != "avi", codec.codec.canonical_name
        if self.timed:
            if any(p.pts is None for p in packets):
                raise UnusableVideo("frames without a time", "some of its frames have no time; write it again")
            packets.sort(key=lambda p: p.pts)
        # an AVI gives packets no time of display: reordered frames are counted as they come out
        self.stamp = "pts" if self.timed else "" if codec.has_b_frames or name in _REORDERED else "dts"
        self.stamp_n = [getattr(p, self.stamp) for p in packets] if self.stamp else list(range(self.count))
        self.shown_n = [name in _SHOWN and p.size > _AS_BEFORE for p in packets]
        self.keys = ([p.pts for p in packets if p.is_keyframe] or self.stamp_n[:1]) if self.timed else [0]

    def times(self) -> list[float]:
        if self.timed:
            return [float(pts * self.stream.time_base) for pts in self.stamp_n]
        return [i / float(self.stream.average_rate or 25) for i in range(self.count)]

    def frames(self, index: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
        times = self.times()
        for i in index:
            key = self.keys[max(0, bisect_right(self.keys, self.stamp_n[i]) - 1)]
            if i == index[0] or key > self.passed:
                self._start(key)
            frame = self._frame(i)
            if frame is None:
                return
            yield frame.to_ndarray(format="rgb24"), times[i]

    def _start(self, key: int) -> None:
        self.container.seek(key, stream=self.stream)
        self.coming, self.key, self.passed, self.before = self.container.decode(self.stream), key, -1, None

    def _frame(self, i: int) -> Any:
        """What is shown at frame i's time; None where the frames end before it."""
        wanted = self.stamp_n[i]
        for frame in self.coming:
            stamp = getattr(frame, self.stamp) if self.stamp else self.passed + 1
            self.passed = self.passed if stamp is None else stamp
            if frame.is_corrupt:
                at = max(0, bisect_right(self.stamp_n, self.passed) - 1)
                raise UnusableVideo("damaged video", f"frame {at} is corrupt; write it again from its source")
            if self.passed > wanted:
                self.coming = chain([frame], self.coming)
                return self._instead(i, frame)
            self.before = frame
            if self.passed == wanted:
                return frame
        return None

    def _instead(self, i: int, after: Any) -> Any:
        """What is shown where no frame came at frame i's time, but one after it."""
        if self.before is None:
            if self.key == self.keys[0]:
                return after  # a film may begin with what only frames before its cut would show
            self._start(self.keys[0])  # not every key frame shows at once what follows it
            return self._frame(i)
        if self.shown_n[i] and self.stamp_n[i - 1] != self.stamp_n[i]:
            raise UnusableVideo("damaged video", f"frame {i} is left out by FFmpeg; write it again from its source")
        return self.before


class _Decord:
    """decord, faster where many frames are taken; it conceals damage within a frame, which PyAV tells."""

    def __init__(self, data: bytes, form: str) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self.reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        self.count = len(self.reader)

    def times(self) -> list[float]:
        return self.reader.get_frame_timestamp(list(range(self.count)))[:, 0].tolist()

    def frames(self, index: Sequence[int]) -> Iterator[tuple[np.ndarray, float]]:
        times = self.times()
        for i in index:
            frame = self.reader[i]  # it tells its size no earlier; the process's limit of memory holds until then
            _check_size(*frame.shape[1::-1])
            yield frame.asnumpy(), times[i]


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        size = f"{width} x {height} pixels, at most {MAX_PIXELS:,}"
        raise UnusableVideo("video too large", f"a frame has {size} are decoded; shrink it")


def _form(data: bytes, suffix: str) -> str:
    """What a file is by its first bytes, which must fit its suffix."""
    head: dict[str, Any] = {
        "mov": data[4:8] in _BOXES, "matroska": data[:4] == _EBML, "avi": data[:4] + data[8:12] == b"RIFFAVI ",
        "WEBP": data[:4] + data[8:12] == b"RIFFWEBP", "GIF": data[:6] in (b"GIF87a", b"GIF89a"),
        "PNG": data[:8] == b"\x89PNG\r\n\x1a\n", "JPEG": data[:3] == b"\xff\xd8\xff",
    }  # fmt: skip
    found = next((form for form, fits in head.items() if fits), "something unknown")
    if found != FORMATS[suffix]:
        raise UnusableVideo("wrong type", f"its content is {found}, not {FORMATS[suffix]}; give it the suffix it is")
    return found


def _check_whole(form: str, data: bytes) -> None:
    """A file that ends before the sizes in it say is refused."""
    size = len(data)
    if form == "mov":
        wanted = _end_of_boxes(data)
    elif form == "matroska":
        wanted = _end_of_segment(data)
    elif form in ("avi", "WEBP"):
        wanted = _end_of_riff(data)
    elif form == "GIF":
        wanted = size + (not data.rstrip(b"\0").endswith(b";"))
    else:
        return  # Pillow tells
    if wanted > size:
        what = f"{size:,} bytes of at least {wanted:,}"
        raise UnusableVideo("video truncated", f"{what}; write it again from its source")


def _end_of_boxes(data: bytes) -> int:
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1 and at + 16 <= len(data):
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size == 0:  # up to the file's end
            return len(data)
        if size < 8:
            raise UnusableVideo("damaged video", f"a box of {size} bytes at byte {at}; write it again from its source")
        at += size
    return at


def _end_of_riff(data: bytes) -> int:
    at = 0
    while data[at : at + 4] == b"RIFF" and at + 8 <= len(data):
        size = struct.unpack_from("<I", data, at + 4)[0]
        at += 8 + size + size % 2
    return at - 1 if at == len(data) + 1 else at  # the last byte that fills up may be missing


def _end_of_segment(data: bytes) -> int:
    at = 0
    for name in (_EBML, _SEGMENT):
        if data[at : at + 4] != name:
            raise UnusableVideo("damaged video", f"no Matroska element at byte {at}; write it again from its source")
        if not data[at + 4 : at + 5]:
            return at + 5
        width = 9 - data[at + 4].bit_length()  # leading zeros tell how many bytes the size has
        size = int.from_bytes(data[at + 4 : at + 4 + width], "big") - (1 << 7 * width)
        if width > 8:
            raise UnusableVideo("damaged video", f"no size at byte {at + 4}; write it again from its source")
        if size == (1 << 7 * width) - 1:  # unknown: it was written to a pipe
            return len(data)
        at += 4 + width + size
    return at
