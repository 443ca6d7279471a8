"""One loading worker's speed at turning shards into tokens, against the bare libraries in a plain loop.

Recordings (3 s, FLAC at 44.1 kHz, generated) to normalised and stacked mel frames:

    mmpre           from the shard to tokens
    torchaudio      webdataset, soundfile, torchaudio's resampling and Kaldi frames; nothing is checked
    transformers    the same up to 16 kHz, then its SeamlessM4TFeatureExtractor

Windows of 1,020 bases (of 65,536-base members, generated) to 6-mers side by side:

    mmpre           from the shard to tokens, with repeats and places
    transformers    the letters are in memory already; EsmTokenizer, as the Nucleotide Transformer's

Functions of Python's own library (of a few modules, 3 to 60 lines) to bytes with their data flow:

    mmpre           from the shard to pieces, nodes, edges and links
    tree-sitter     the text is in memory already; it is parsed, and nothing more

Films (MP4, 90 frames of 320 x 240, generated) to tubelets: 8 frames, the middle of each, 112 x 112, 2 x 16 x 16:

    mmpre           from the shard to tokens; files are checked, and decoded in a process of its own
    decord          webdataset, decord in the loading process, torchvision's resizing; nothing is checked
    av              the same by PyAV, which decodes from the first frame to the last that is taken

Animations (WebP, 24 frames of 128 x 128, generated) to the same tubelets:

    mmpre           as above
    pillow          webdataset and Pillow in the loading process

Regions (10 to 100 of a picture, 2,048 features and 1,601 soft labels each, in half precision, generated):

    mmpre           from the shard to tokens; shapes, boxes, sums and numbers that are not finite are checked
    safetensors     webdataset and safetensors, boxes and labels made float32; nothing is checked
"""

import ast
import io
import sysconfig
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import cycle, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import safetensors.numpy
import safetensors.torch
import soundfile
import torch
from PIL import Image

from mmpre.benchmark import Comparison, Settings, Turn
from mmpre.data.audio import Audio
from mmpre.data.index import open_shards
from mmpre.data.shards import ShardReader, shard_writer
from mmpre.data.units import Units, measure
from mmpre.data.video import Segments, Video
from mmpre.draw import Draw
from mmpre.modalities.code_graph import CodeReader
from mmpre.modalities.dna import DnaReader, Kmers
from mmpre.modalities.regions import RegionReader
from mmpre.modalities.speech import FbankReader
from mmpre.modalities.video import VideoReader, middle, tubelets
from mmpre.modality import Reader
from mmpre.recipes.benchmarks.harness import serve, take_turns, timed
from mmpre.recipes.benchmarks.pairs import region_count, regions

description = "one loading worker on recordings, genomes, programs, video and regions, against the bare libraries"

RATE_HZ, SECONDS, RECORDINGS, BASES, MEMBERS = 44_100, 3, 48, 65_536, 4
CLIPS, FRAMES = 12, 8
PICTURES, FEATURES, CLASSES = 128, 2048, 1601
MODULES = ("argparse", "statistics", "tarfile", "textwrap", "zipfile")


def run(settings: Settings) -> Iterator[Comparison]:
    cases = {
        "recordings": write_recordings, "genomes": write_genomes, "programs": write_programs, "films": write_films,
        "animations": write_animations, "regions": write_regions,
    }  # fmt: skip
    for title, write in cases.items():
        if settings.cases not in title:
            continue
        with TemporaryDirectory() as folder:
            write(Path(folder))
            names = [name.split()[1] for name in CONTENDERS if name.startswith(title)]
            given = {"data": folder, "steps": settings.steps or 300}
            turns = take_turns(__spec__.name, [f"{title} {name}" for name in names], given, settings, title)
            turns = {name.split()[1]: found for name, found in turns.items()}
            yield Comparison(title=title, unit="rows", turns=turns, about={"threads": 1, **given})


def write_recordings(folder: Path) -> None:
    rng = np.random.default_rng(0)
    with shard_writer(folder, prefix="sounds") as sink:
        for i in range(RECORDINGS):
            time_T, file = np.arange(RATE_HZ * SECONDS) / RATE_HZ, io.BytesIO()
            wave_T = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 900) * time_T) + rng.normal(0, 0.02, len(time_T))
            soundfile.write(file, wave_T, RATE_HZ, format="FLAC")
            sink.write({"__key__": f"sound{i:03d}", "flac": file.getvalue()})


def write_genomes(folder: Path) -> None:
    rng = np.random.default_rng(0)
    with shard_writer(folder, prefix="genomes") as sink:
        for i in range(MEMBERS):
            sink.write({"__key__": f"genome{i}", "dna": rng.choice(list("ACGTacgt"), BASES).astype("S1").tobytes()})


def write_programs(folder: Path) -> None:
    with shard_writer(folder, prefix="programs") as sink:
        for module in MODULES:
            text = (Path(sysconfig.get_path("stdlib")) / f"{module}.py").read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef) and 3 <= node.end_lineno - node.lineno < 60:
                    lines = text.splitlines(keepends=True)[node.lineno - 1 : node.end_lineno]
                    key = f"{module}-{node.lineno:05d}"
                    sink.write({"__key__": key, "py": textwrap.dedent("".join(lines))})


def moving(count: int, height: int, width: int, seed: int) -> np.ndarray:
    """Frames of a pattern that moves over noise."""
    rng = np.random.default_rng(seed)
    ground_HW3, patch_HW3 = (rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((height, width), (48, 48)))
    ground_HW3 //= 4
    frame_THW3 = np.repeat(ground_HW3[None], count, 0)
    for t in range(count):
        x, y = (width - 48) * t // count, height // 2 + (seed * 7) % 40 - 44
        frame_THW3[t, y : y + 48, x : x + 48] = patch_HW3
    return frame_THW3


def write_films(folder: Path) -> None:
    import av

    with shard_writer(folder, prefix="films") as sink:
        for i in range(CLIPS):
            file = io.BytesIO()
            with av.open(file, "w", format="mp4") as container:
                stream = container.add_stream("libx264", rate=30)
                stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
                for frame_HW3 in moving(90, 240, 320, i):
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HW3, "rgb24")))
                container.mux(stream.encode())
            sink.write({"__key__": f"film{i}", "mp4": file.getvalue()})


def write_animations(folder: Path) -> None:
    with shard_writer(folder, prefix="animations") as sink:
        for i in range(CLIPS):
            first, *others = map(Image.fromarray, moving(24, 128, 128, i))
            file = io.BytesIO()
            first.save(file, "WEBP", save_all=True, append_images=others, duration=40, quality=80, method=0)
            sink.write({"__key__": f"animation{i}", "webp": file.getvalue()})


def write_regions(folder: Path) -> None:
    rng = np.random.default_rng(0)
    with shard_writer(folder, prefix="regions") as sink:
        for i in range(PICTURES):
            tensors = regions(rng, region_count(rng), FEATURES, CLASSES)
            sink.write({"__key__": f"picture{i:03d}", "regions.safetensors": safetensors.numpy.save(tensors)})


def ours(reader: Reader, data: str, steps: int) -> Turn:
    """Units in a scattered order, as in training."""
    torch.set_num_threads(1)
    units = measure(Units(ShardReader(open_shards(data))), [reader], Path(data))
    order = np.random.default_rng(0).permutation(len(units)).tolist()
    draw = Draw.row(0, 0, 0, epoch=0, unit=0)
    return timed(each(lambda unit: reader.tokenize(units.sample(unit), draw), cycle(order)), warmup=20, count=steps)


def each(work: Callable[[Any], object], rows: Iterable[Any]) -> Iterator[int]:
    for row in rows:
        work(row)
        yield 1


def recordings(data: str) -> Iterator[torch.Tensor]:
    """Waveforms at 16 kHz, as one would read them without mmpre."""
    import torchaudio
    import webdataset

    torch.set_num_threads(1)
    resample = torchaudio.transforms.Resample(RATE_HZ, 16_000)
    for _ in cycle([0]):
        for sample in webdataset.WebDataset(sorted(map(str, Path(data).glob("*.tar"))), shardshuffle=False):
            wave_T, _ = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
            yield resample(torch.from_numpy(wave_T))


def torchaudio_frames(data: str, steps: int) -> Turn:
    from torchaudio.compliance import kaldi

    def frames(wave_T: torch.Tensor) -> torch.Tensor:
        frame_FE = kaldi.fbank(wave_T[None] * 2**15, num_mel_bins=80, sample_frequency=16_000)
        frame_FE = (frame_FE - frame_FE.mean(0)) / (frame_FE.var(0) + 1e-7).sqrt()
        return frame_FE[: len(frame_FE) // 2 * 2].reshape(-1, 160)

    return timed(each(frames, recordings(data)), warmup=20, count=steps)


def transformers_frames(data: str, steps: int) -> Turn:
    from transformers import SeamlessM4TFeatureExtractor

    extract = SeamlessM4TFeatureExtractor()
    frames = each(lambda wave_T: extract(wave_T.numpy(), sampling_rate=16_000), recordings(data))
    return timed(frames, warmup=20, count=steps)


def transformers_words(data: str, steps: int) -> Turn:
    from transformers import EsmTokenizer

    vocabulary = Path(data) / "vocabulary.txt"
    words = ["<unk>", "<pad>", "<mask>", "<cls>", *map("".join, product("ATCG", repeat=6)), *"ATCGN"]
    vocabulary.write_text("\n".join(words))
    tokenizer = EsmTokenizer(str(vocabulary), eos_token=None)
    reader = ShardReader(open_shards(data))
    letters = [reader.read(i)["dna"].decode().upper() for i in range(MEMBERS)]
    windows = [one[i : i + 1020] for one in letters for i in range(0, BASES, 1020)]
    return timed(each(tokenizer, cycle(windows)), warmup=20, count=steps)


def parse(data: str, steps: int) -> Turn:
    import tree_sitter
    import tree_sitter_python

    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_python.language()))
    reader = ShardReader(open_shards(data))
    texts = [reader.read(i)["py"] for i in range(len(reader.shards))]
    return timed(each(parser.parse, cycle(texts)), warmup=20, count=steps)


def decord_frames(data: bytes) -> np.ndarray:
    import decord

    reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
    return reader.get_batch(taken(len(reader))).asnumpy()


def av_frames(data: bytes) -> np.ndarray:
    import av

    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        wanted = set(taken(container.streams.video[0].frames))
        frames = enumerate(container.decode(video=0))
        return np.stack([frame.to_ndarray(format="rgb24") for i, frame in frames if i in wanted])


def pillow_frames(data: bytes) -> np.ndarray:
    picture, frames = Image.open(io.BytesIO(data)), []
    for i in taken(picture.n_frames):
        picture.seek(i)
        frames.append(np.asarray(picture.convert("RGB")))
    return np.stack(frames)


def taken(frames: int) -> list[int]:
    """The middle of each of eight parts."""
    return [int((i + 0.5) / FRAMES * frames) for i in range(FRAMES)]


def film_tubelets(frames: Callable[[bytes], np.ndarray], data: str, steps: int) -> Turn:
    """Tubelets as one would make them without mmpre."""
    import webdataset
    from torchvision.transforms import v2 as transforms

    torch.set_num_threads(1)
    square = transforms.Compose(
        [transforms.Resize(112, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(112)]
    )

    def members() -> Iterator[bytes]:
        for _ in cycle([0]):
            for sample in webdataset.WebDataset(sorted(map(str, Path(data).glob("*.tar"))), shardshuffle=False):
                yield sample.get("mp4") or sample["webp"]

    def made(member: bytes) -> torch.Tensor:
        return tubelets(square(torch.from_numpy(frames(member)).permute(0, 3, 1, 2)), 2, 16)

    return timed(each(made, members()), warmup=20, count=steps)


def bare_regions(data: str, steps: int) -> Turn:
    import webdataset

    torch.set_num_threads(1)

    def members() -> Iterator[bytes]:
        for _ in cycle([0]):
            for sample in webdataset.WebDataset(sorted(map(str, Path(data).glob("*.tar"))), shardshuffle=False):
                yield sample["regions.safetensors"]

    def made(member: bytes) -> dict[str, torch.Tensor]:
        tensors = safetensors.torch.load(member)
        return tensors | {name: tensors[name].float() for name in ("boxes", "soft")}

    return timed(each(made, members()), warmup=20, count=steps)


def our_clips(data: str, steps: int) -> Turn:
    return ours(VideoReader(Video(sampling=Segments(FRAMES, random=False)), 16, 2, middle(112)), data, steps)


CONTENDERS = {
    "recordings mmpre": lambda **given: ours(FbankReader(Audio(windowed=True)), **given),
    "recordings torchaudio": torchaudio_frames,
    "recordings transformers": transformers_frames,
    "genomes mmpre": lambda **given: ours(DnaReader(Kmers(6), length=1020), **given),
    "genomes transformers": transformers_words,
    "films mmpre": our_clips,
    "films decord": partial(film_tubelets, decord_frames),
    "films av": partial(film_tubelets, av_frames),
    "animations mmpre": our_clips,
    "animations pillow": partial(film_tubelets, pillow_frames),
    "programs mmpre": lambda **given: ours(CodeReader("bytes", max_length=4096), **given),
    "programs tree-sitter": parse,
    "regions mmpre": lambda **given: ours(RegionReader(FEATURES, CLASSES), **given),
    "regions safetensors": bare_regions,
}

if __name__ == "__main__":
    serve(CONTENDERS)
