"""Two towers: a thing and the words for it, each by an encoder of its own, shall know each other among all of a step.

Paper    Radford et al. 2021 (CLIP, arXiv:2103.00020); with `sigmoid` Zhai et al. 2023 (SigLIP, arXiv:2303.15343)
Follows  symmetric cross-entropy over cosines with a learned temperature that starts at 0.07, or the sigmoid loss with a
         learned scale and bias; one linear map to a shared space of unit vectors
Differs  towers are this project's plain encoders, as in recipes/masked.py, and the mean of their states is taken
Expect   not run at paper scale; tiny: RESULTS.md
Run      mmpre train two_towers --scale tiny --thing image_patches --data "pictures/*.tar"
"""

from typing import Literal

from torch import nn

from mmpre.data.audio import Audio
from mmpre.data.video import Segments, Video
from mmpre.encoder import llama_encoder
from mmpre.heads.pool import Mean, Tower
from mmpre.modalities.image_patches import ImagePatches, ImageReader, random_crops
from mmpre.modalities.speech import FbankReader, Speech
from mmpre.modalities.text import Text, TextReader
from mmpre.modalities.video import VideoReader, VideoTubelets
from mmpre.network import Network
from mmpre.objectives.contrast import Contrast, InfoNCE, SigLIP
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Cosine
from mmpre.training.optim import AdamW
from mmpre.view import View


def two_towers(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a thing and a text
    valid: tuple[str, ...] = (),  # held-out shards
    thing: Literal["image_patches", "video", "speech", "code"] = "image_patches",  # what stands beside the text
    tokenizer: str = "bytes",  # of texts: path of a tokenizer.json, or bytes
    patch_px: int = 16,  # side of a picture's patch
    side_px: int = 224,  # of the squares that are cut from pictures at random and flipped
    frames: int = 8,  # of a clip, evenly spread; two make a tubelet
    stack: int = 4,  # mel frames of 10 ms in a token of speech
    length: int = 64,  # tokens of a text at most
    thing_length: int = 256,  # tokens of a thing at most
    width: int = 512,  # of the states
    depth: int = 12,  # layers of each tower
    heads: int = 8,  # of attention
    shared: int = 512,  # values of a vector in the shared space
    sigmoid: bool = False,  # SigLIP's loss in place of CLIP's
    batch: int = 4_096,  # rows in a step, all compared with each other
    micro_batches: int = 16,  # parts of a step; what the number of processes must divide
    steps: int = 100_000,  # updates
    warmup: int = 2_000,  # steps to the peak learning rate, which then falls by half a cosine to 0
    lr: float = 5e-4,  # at its peak
    decay: float = 0.2,  # of weights, not of biases and norms
    valid_every: int = 5_000,  # steps
) -> Recipe:
    ways = {
        "image_patches": lambda: ImagePatches(
            ImageReader(patch_px, random_crops(side_px, least=0.5), thing_length), width=width
        ),
        "video": lambda: VideoTubelets(
            VideoReader(Video(sampling=Segments(frames), side_px=side_px), patch_px, max_patches=thing_length),
            width=width,
        ),
        "speech": lambda: Speech(FbankReader(Audio(seconds=thing_length * stack / 100), stack=stack), width=width),
        "code": lambda: Text(
            TextReader(tokenizer, max_length=thing_length, suffixes=("py",)), width=width, positions=0, dropout=0.0
        ),
    }
    text = Text(TextReader(tokenizer, max_length=length), width=width, positions=0, dropout=0.0)
    towers = {
        role: Tower(
            Network({role: modality}, llama_encoder(width, depth, heads)), Mean(role),
            nn.Linear(width, shared, bias=False),
        )
        for role, modality in {thing: ways[thing](), "text": text}.items()
    }  # fmt: skip
    pairing = SigLIP() if sigmoid else InfoNCE(0.07, learned=True)
    views = {role: View(roles=(role,)) for role in towers}
    task = Task("pairs", views, Contrast(towers, pairing))
    optimizer = AdamW(lr=lr, betas=(0.9, 0.98), weight_decay=decay, schedule=Cosine(warmup=warmup, total=steps))
    stage = Stage(
        tasks=[task], data=data, valid=valid, steps=steps, batch=batch, micro_batches=micro_batches,
        optimizer=optimizer, valid_every=valid_every,
    )  # fmt: skip
    return Recipe([stage], towers[thing].net, towers=towers)


scales = {
    "tiny": dict(
        width=128, depth=3, heads=4, shared=64, patch_px=12, side_px=96, batch=128, micro_batches=1, steps=600,
        warmup=60, lr=1e-3, valid_every=200,
    ),
    "base": {},
}  # fmt: skip
