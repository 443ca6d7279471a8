"""Every modality keeps to the contract, and the checks of it find what breaks it."""

import dataclasses

import clips
import pytest
import safetensors.torch
import timm
import torch
from pictures import noise
from pictures import sample as picture
from sounds import sample as recording
from sounds import sound
from tones import ToneReader, Tones
from torch import nn

from mmpre.data.audio import Audio
from mmpre.data.sample import BadMember, Sample
from mmpre.data.video import Segments, Video
from mmpre.modalities.code_graph import CodeGraph, CodeReader
from mmpre.modalities.dna import Bases, Dna, DnaReader, Kmers
from mmpre.modalities.image_patches import ImagePatches, ImageReader, random_crops
from mmpre.modalities.regions import BoxedRegions, RegionReader, Regions
from mmpre.modalities.speech import (
    ConvolutionalPositions,
    Convolutions,
    FbankReader,
    FrameConvolutions,
    Speech,
    WaveReader,
)
from mmpre.modalities.text import Text, TextReader
from mmpre.modalities.timm_images import SquareReader, TimmImages
from mmpre.modalities.video import VideoReader, VideoTubelets
from mmpre.modalities.video import random_crops as crops
from mmpre.testing import check_modality
from mmpre.tokens import Ragged

SHORT = ((10, 5), (3, 2), (2, 2))


def member(suffix, data, key="a"):
    return Sample(key, "shard", "digest", {suffix: data})


def texts():
    written = ("two birds fly", "a small bear sits under the old tree " * 4, "trees")
    return [member("txt", text.encode(), str(i)) for i, text in enumerate(written)]


def regions():
    made = []
    for i, count in enumerate((3, 7, 5)):
        torch.manual_seed(i)
        corner, size = torch.rand(count, 2) / 2, torch.rand(count, 2) / 2
        box = torch.cat([corner, corner + size, size, size.prod(1, keepdim=True)], 1)
        soft = torch.rand(count, 4).softmax(1)
        data = safetensors.torch.save({"features": torch.rand(count, 6), "boxes": box, "soft": soft})
        made.append(member("regions.safetensors", data, str(i)))
    return made


def genomes():
    letters = torch.randint(4, (400,), generator=torch.Generator().manual_seed(0))
    text = "".join("ACGT"[i] for i in letters)
    return [member("fa", f">a\n{text[:n]}\n>b\nNN{text[n:]}".encode(), str(n)) for n in (33, 200, 350)]


def recordings():
    return [recording(sound(seconds, seed=i), "flac", key=str(i)) for i, seconds in enumerate((0.11, 0.4, 0.23))]


def films():
    shapes = ((9, 16, 24), (3, 30, 20), (5, 16, 16))
    files = [clips.animation(clips.frames(*shapes[0])), clips.film(clips.frames(*shapes[1]), "mp4"),
             clips.animation(clips.frames(*shapes[2]), "gif")]  # fmt: skip
    return [clips.sample(data, suffix, suffix) for data, suffix in zip(files, ("webp", "mp4", "gif"), strict=True)]


def programs():
    written = (
        "def f(a):\n    # twice\n    b = a * 2\n    return b\n",
        "x = y\n" * 30,
        "for i in range(9):\n    s = s + i\n",
    )
    return [member("py", text.encode(), str(i)) for i, text in enumerate(written)]


def melodies():
    return [member("notes", notes, str(i)) for i, notes in enumerate((b"1 2 3.5", b"5 4 3 2 1 0 1", b"7 9"))]


def module(make, *more):
    torch.manual_seed(0)
    return make(*more)


CASES = {
    "text": lambda: (Text(TextReader("bytes", max_length=20, windowed=True), width=8, types=1), texts(), "position"),
    "regions": lambda: (
        Regions(RegionReader(6, 4), width=8, types=nn.Embedding(2, 8)), regions(), "box",
    ),
    "regions, as they stand": lambda: (BoxedRegions(RegionReader(6, 4), width=8), regions(), "box"),
    "image patches": lambda: (
        ImagePatches(ImageReader(4, random_crops(16)), width=8),
        [picture(noise(12, 17 + i)) for i in range(3)], "position",
    ),
    "speech, frames": lambda: (
        Speech(FbankReader(Audio(seconds=0.15, windowed=True)), width=16,
               positions=ConvolutionalPositions(16, kernel=6)), recordings(), "position",
    ),
    "speech, waves": lambda: (
        Speech(WaveReader(Audio(seconds=0.3), SHORT), width=16, convolutions=Convolutions(SHORT, channels=8)),
        recordings(), "position",
    ),
    "speech, frames through convolutions": lambda: (
        Speech(FbankReader(Audio(seconds=0.3), stack=4), width=8,
               convolutions=FrameConvolutions((4, 2), stack=4, bins=80)), recordings(), (),
    ),
    "speech, noise for what is hidden": lambda: (
        Speech(FbankReader(Audio(seconds=0.3), stack=4), width=8, noise=0.1), recordings(), (),
    ),
    "pictures through a model of timm": lambda: (
        TimmImages(SquareReader(32, 16), timm.create_model(
            "vit_tiny_patch16_224", num_classes=0, img_size=32, embed_dim=16, depth=1, num_heads=2), width=8),
        [picture(noise(32, 40 + i)) for i in range(3)], "place",
    ),
    "dna": lambda: (Dna(DnaReader(Kmers(3), length=90, reverse=0.5), width=8, positions=True), genomes(), "position"),
    "dna, bases": lambda: (Dna(DnaReader(Bases(), length=90), width=8), genomes(), ()),
    "dna, overlapping words": lambda: (
        Dna(DnaReader(Kmers(3, overlap=True), length=90), width=8, positions=True), genomes(), "position",
    ),
    "video": lambda: (
        VideoTubelets(VideoReader(Video(sampling=Segments(4)), patch_px=8, transform=crops(16)), width=8),
        films(), "position",
    ),
    "code graph": lambda: (
        CodeGraph(CodeReader("bytes", max_length=90, comments=True, max_comment=20), width=8), programs(),
        ("position", "word", "node", "code"),
    ),
    "tones": lambda: (Tones(8), melodies(), "position"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_modality_keeps_to_the_contract(name):
    modality, samples, visible = module(CASES[name])
    check_modality(modality, samples, visible=(visible,) if isinstance(visible, str) else visible)
    assert all(one.grad is None for one in modality.parameters()) and modality.training


class Leaky(Tones):
    def embed(self, f_NE, tokens, replaced_N):
        return super().embed(f_NE, tokens, replaced_N) + tokens["pitch"][:, None]


class Open(Tones):
    def embed(self, f_NE, tokens, replaced_N):
        return self.project(0 * f_NE) + self.position(tokens["position"]) + 0 * self.mask_D


class Neighbours(Tones):
    def embed(self, f_NE, tokens, replaced_N):
        x_ND = super().embed(f_NE, tokens, replaced_N)
        return x_ND + x_ND.roll(1, 0)


class Idle(Tones):
    def __init__(self, width):
        super().__init__(width)
        self.forgotten = nn.Linear(width, width)


class Stays(Tones):
    def __init__(self, width):
        super().__init__(width)
        self.scale = torch.full((width,), 2.0)

    def embed(self, f_NE, tokens, replaced_N):
        return super().embed(f_NE, tokens, replaced_N) * self.scale


class Waits(Tones):
    def embed(self, f_NE, tokens, replaced_N):
        return super().embed(f_NE, tokens, replaced_N) * (2.0 if tokens["pitch"].max().item() > 0 else 1.0)


class Short(Tones):
    def embed(self, f_NE, tokens, replaced_N):
        return super().embed(f_NE, tokens, replaced_N)[:-1]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Leaky, r"must not show what a replaced token was \(its features, or a field .* off"),
        (Open, "must show a replaced token otherwise than an ordinary one"),
        (Neighbours, "a row among others must be embedded as it is alone; got .* off"),
        (Idle, r"gradients must reach every parameter; got none in forgotten\.weight, forgotten\.bias"),
        (Stays, "must run where the module is, without reading values back"),
        (Waits, "must run where the module is, without reading values back"),
        (Short, r"embed must return one vector for each token; got \[11, 8\] for 12"),
    ],
)
def test_a_module_that_breaks_the_contract_is_found(broken, message):
    with pytest.raises(AssertionError, match=message):
        check_modality(module(broken, 8), melodies())


class Forgetful(ToneReader):
    def tokenize(self, sample, draw):
        tokens = super().tokenize(sample, draw)
        return tokens.with_values(pitch=tokens["pitch"] + torch.rand(()))


class Stepping(ToneReader):
    def tokenize(self, sample, draw):
        tokens = super().tokenize(sample, draw)
        return tokens.with_values(pitch=tokens["pitch"] + draw.step)


class Raising(ToneReader):
    def tokenize(self, sample, draw):
        return super().tokenize(Sample(sample.key, "s", "d", {"notes": sample.members["notes"]}), draw)


class Trusting(ToneReader):
    def tokenize(self, sample, draw):
        try:
            return super().tokenize(sample, draw)
        except BadMember as e:
            raise BadMember("", e.member, e.detail) from None


class Special(ToneReader):
    def tokenize(self, sample, draw):
        tokens = super().tokenize(sample, draw)
        return dataclasses.replace(tokens, special_N=torch.zeros(len(tokens), dtype=torch.int64))


class Pointing(ToneReader):
    def tokenize(self, sample, draw):
        tokens = super().tokenize(sample, draw)
        there = Ragged(torch.tensor([len(tokens)]), torch.tensor([1]), "tokens")
        return dataclasses.replace(tokens, fields={**tokens.fields, "next": there})


class Changing(ToneReader):
    def tokenize(self, sample, draw):
        tokens = super().tokenize(sample, draw)
        return tokens.with_values(pitch=tokens["pitch"].double()) if len(tokens) > 3 else tokens


class Windows(ToneReader):
    windowed, digest = True, "windows"

    def windows(self, sample):
        return [len(super().tokenize(sample, None)) + 1]


@dataclasses.dataclass(frozen=True)
class Closure(ToneReader):
    made: object = dataclasses.field(default_factory=lambda: lambda: 0)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Forgetful, "the same sample and draw must give the same tokens; got another pitch"),
        (Stepping, "a row's tokens must not depend on the step"),
        (Raising, r"a missing member must raise BadMember\(cause, member, detail\), .* got KeyError: 'notes'"),
        (Trusting, "BadMember needs a cause and a member; got '', 'notes'"),
        (Special, "a row must have a token that is not special"),
        (Pointing, "field 'next' must refer to entries of 'tokens', of which there are 3; got 3 to 3"),
        (Changing, "all samples must give the same fields, types and widths"),
        (Windows, r"windows\(sample\) must announce the tokens of each window; got \[4\], made \[3\]"),
        (Closure, "a reader must be picklable, for loading workers"),
    ],
)
def test_a_reader_that_breaks_the_contract_is_found(broken, message):
    modality = module(Tones, 8)
    modality.reader = broken()
    with pytest.raises(AssertionError, match=message):
        check_modality(modality, melodies())


def test_what_is_no_modality_or_too_few_samples_is_told():
    with pytest.raises(
        AssertionError, match=r"a modality must be an nn.Module with a reader, features and embed; got L"
    ):
        check_modality(nn.Linear(1, 1), melodies())
    with pytest.raises(AssertionError, match="at least two samples are needed"):
        check_modality(module(Tones, 8), melodies()[:1])
