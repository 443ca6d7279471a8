"""Masked prediction for any one modality: hide some tokens, read the rest, predict what was hidden.

Paper    none: the plainest form of what Devlin et al. 2018 (arXiv:1810.04805) do for words, Xie et al. 2021 (SimMIM,
         arXiv:2111.09886) for patches, Baevski et al. 2020 (arXiv:2006.11477) for spans of speech
Follows  text, code and DNA: the id, 80 percent masks, 10 random, 10 kept; pictures: pixels normalised within their
         patch; speech: mel frames; regions: their features. Pictures have fixed places in two dimensions; all others
         have none but the encoder's rotary ones, which tell distances alone. A text about the code stands in front of
         it, where samples have one, and behind it the graph of its data flow, whose nodes have a place of their own
Differs  one encoder, Llama's layers looking both ways, for all of them, so that what differs is the data
Expect   tiny: RESULTS.md
Run      mmpre train masked --scale tiny --modality text --data "text/*.tar"
"""

from collections.abc import Callable
from typing import Literal

from torch import nn

from mmpre.attention import Full
from mmpre.data.audio import Audio
from mmpre.data.code import LANGUAGES
from mmpre.data.video import Video
from mmpre.encoder import llama_encoder
from mmpre.heads.pixels import Pixels
from mmpre.heads.region import RegionFeature
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.corrupt import HideAll
from mmpre.masking.protocol import Corruption
from mmpre.masking.random import RandomTokens
from mmpre.masking.spans import StartedSpans
from mmpre.modalities.code_graph import CodeGraph, CodeReader, graph_attend
from mmpre.modalities.dna import Bases, Dna, DnaReader, Kmers
from mmpre.modalities.image_patches import ImagePatches, ImageReader, random_crops
from mmpre.modalities.regions import RegionReader, Regions
from mmpre.modalities.speech import FbankReader, Speech
from mmpre.modalities.text import Text, TextReader
from mmpre.modalities.video import VideoReader, VideoTubelets
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Cosine
from mmpre.tokens import Tokens
from mmpre.training.optim import AdamW
from mmpre.view import View

Kind = Literal["text", "image_patches", "video", "regions", "speech", "dna", "code_graph"]
Parts = tuple[nn.Module, Corruption, nn.Module]  # a modality, what hides its tokens, the head that predicts them


def masked(
    data: tuple[str, ...] = (),  # shards to train on
    valid: tuple[str, ...] = (),  # held-out shards
    sidecar: str = "",  # folder of the training shards' region features; "" where the shards hold them
    valid_sidecar: str = "",  # the same for the held-out shards
    modality: Kind = "text",  # what is read of a sample
    member: str = "",  # its suffix, such as py for text that is code; "" for the modality's own
    tokenizer: str = "bytes",  # of text and code: path of a tokenizer.json, or bytes
    kmer: int = 1,  # bases of a token of DNA
    patch_px: int = 16,  # side of a picture's or a clip's patch
    side_px: int = 0,  # of squares cut from pictures at random and flipped; 0 takes them whole
    features: int = 2048,  # values of a region
    stack: int = 4,  # mel frames of 10 ms in a token of speech
    length: int = 512,  # tokens in a window at most
    width: int = 768,  # of the states
    depth: int = 12,  # layers
    heads: int = 12,  # of attention
    mask: Literal["tokens", "spans"] = "tokens",  # what is hidden: tokens by themselves, or runs of them
    hide: float = 0.15,  # share of the tokens that is hidden
    span: int = 4,  # tokens of a run
    batch: int = 256,  # rows in a step
    micro_batches: int = 8,  # parts of a step; what the number of processes must divide
    steps: int = 100_000,  # updates
    warmup: int = 5_000,  # steps to the peak learning rate, which then falls by half a cosine to 0
    lr: float = 5e-4,  # at its peak
    decay: float = 0.05,  # of weights, not of biases and norms
    clip: float = 1.0,  # largest norm of the gradient
    valid_every: int = 5_000,  # steps
) -> Recipe:
    suffixes = {"suffixes": (member,)} if member else {}

    def text() -> Parts:
        reader = TextReader(tokenizer, max_length=length, windowed=True, **suffixes)
        words = Text(reader, width=width, positions=0, dropout=0.0)
        return words, reader.replacement(), Vocabulary(words.table)

    def dna() -> Parts:
        cutter = Bases() if kmer == 1 else Kmers(kmer)
        reader = DnaReader(cutter, length=length * kmer, reverse=0.5, ends=False, **suffixes)
        bases = Dna(reader, width=width)
        return bases, reader.replacement(), Vocabulary(bases.table)

    def image_patches() -> Parts:
        crops = random_crops(side_px, least=0.5) if side_px else None
        image = ImagePatches(ImageReader(patch_px, crops, max_patches=length, **suffixes), width=width)
        return image, HideAll(), Pixels(width, 3 * patch_px**2, image.features)

    def video() -> Parts:
        reader = VideoReader(Video(**suffixes), patch_px, max_patches=length)
        clip = VideoTubelets(reader, width=width)
        return clip, HideAll(), Pixels(width, 3 * reader.frames * patch_px**2, clip.features)

    def regions() -> Parts:
        reader, types = RegionReader(features, max_regions=length, **suffixes), nn.Embedding(2, width)
        image = Regions(reader, width=width, types=types, dropout=0.0)
        return image, HideAll(), RegionFeature(image.project)

    def speech() -> Parts:
        audio = Audio(seconds=length * stack / 100, windowed=True, **suffixes)
        heard = Speech(FbankReader(audio, stack=stack), width=width)
        return heard, HideAll(), Pixels(width, heard.reader.bins * stack, _frames, normalise=False)

    def code_graph() -> Parts:
        languages = [one for one in LANGUAGES if member in ("", one.suffix)]
        if not languages:
            raise ValueError(f"masked: member must be one of {', '.join(o.suffix for o in LANGUAGES)}, got {member!r}")
        reader = CodeReader(
            tokenizer, max_length=length, max_nodes=length // 4, comments=True, about=("txt",), max_comment=length // 4,
            languages=languages,
        )  # fmt: skip
        code = CodeGraph(reader, width=width, dropout=0.0)
        return code, reader.replacement(), Vocabulary(code.table)

    ways: dict[str, Callable[[], Parts]] = {
        "text": text, "image_patches": image_patches, "video": video, "regions": regions, "speech": speech, "dna": dna,
        "code_graph": code_graph,
    }  # fmt: skip
    reads, hides, head = ways[modality]()
    attend = graph_attend(modality) if modality == "code_graph" else Full()
    network = Network({modality: reads}, llama_encoder(width, depth, heads), attend=attend)
    if mask == "tokens":
        picks = RandomTokens(role=modality, rate=hide)
    else:  # starts so rare that runs, which may overlap, cover the share
        picks = StartedSpans(role=modality, chance=1 - (1 - hide) ** (1 / span), length=span)
    view = View(picks={"hidden": picks}, corruption=hides, attend=attend)
    task = Task("masked", view, OnePass(network, [Predict("hidden", head)]))
    optimizer = AdamW(lr=lr, betas=(0.9, 0.98), weight_decay=decay, schedule=Cosine(warmup=warmup, total=steps))
    stage = Stage(
        tasks=[task], data=data, sidecar=sidecar or None, valid=valid, valid_sidecar=valid_sidecar or None, steps=steps,
        batch=batch, micro_batches=micro_batches, clip=clip, optimizer=optimizer, valid_every=valid_every,
    )  # fmt: skip
    return Recipe([stage], network)


def _frames(tokens: Tokens):
    return tokens["frame"]


scales = {
    "tiny": dict(
        width=128, depth=4, heads=4, length=128, batch=32, micro_batches=1, steps=2_000, warmup=200, lr=2e-3,
        valid_every=500,
    ),
    "base": {},
    "large": dict(width=1024, depth=24, heads=16),
}  # fmt: skip
