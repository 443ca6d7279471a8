"""ModernBERT: BERT with rotary attention that is mostly local, gated feed-forwards, and no biases.

Paper    Warner et al. 2024, "Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder", arXiv:2412.13663
Follows  the first of the paper's three phases (1.7 trillion tokens in rows of 1,024) by the authors' code and yaml
         (AnswerDotAI/ModernBERT): 30 percent hidden of which 80 masked, 10 random, 10 kept, held-out loss at 15
         percent; every third layer sees the whole row, the others 64 tokens to each side; rows of a step grow from 768
         to 4,608 over 50 billion tokens; learning rate constant after a warm-up; decay by the schedule alone, not of
         norms and biases; vocabulary rows a multiple of 64
Differs  AdamW with clipped gradients (theirs: StableAdamW, which clips each tensor's updates); rows are windows of
         whole words of one text; tables start from a normal distribution that is not cut off; `cooldown` falls along a
         line (theirs: one minus a root, after the second phase). The phases of 8,192 tokens are this recipe with
         --start, --length 8192, --theta 160000 and their learning rates; large stops where theirs was restarted at a
         tenth of the learning rate, does not begin as a tiled base, and its batch sizes were not checked against the
         authors' files. Bytes unless a tokenizer is given (theirs: 50,368 rows of pieces and unused ones)
Expect   not run at paper scale
Run      mmpre train modernbert --scale tiny --data "text/*.tar"
"""

import math

from torch import nn

from mmpre.encoder import modernbert_encoder
from mmpre.exchange.imports import start_of
from mmpre.heads.transform import Transform
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.random import RandomTokens
from mmpre.modalities.text import Text, TextReader
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import WSD, BatchRamp
from mmpre.training.optim import AdamW
from mmpre.view import View

EPS = 1e-5


def modernbert(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a text
    valid: tuple[str, ...] = (),  # held-out shards
    tokenizer: str = "bytes",  # path of a tokenizer.json, or bytes
    start: str = "",  # run, or folder of transformers, that the weights start from
    width: int = 768,  # of the states
    depth: int = 22,  # layers
    heads: int = 12,  # of attention
    hidden: int = 1_152,  # inner width of the feed-forward
    length: int = 1_024,  # tokens in a window at most, [CLS] and [SEP] included
    every: int = 3,  # of so many layers one sees the whole row, beginning with the first
    reach: int = 64,  # tokens to each side that the others see
    theta: float = 10_000.0,  # base of the rotary embeddings of layers that see the whole row
    local_theta: float = 10_000.0,  # base of the others'
    hide: float = 0.3,  # chance of a token to be predicted
    valid_hide: float = 0.15,  # the same in held-out rows, so that recipes can be compared
    first_batch: int = 768,  # rows in the first step
    growth: int = 18_165,  # steps over which they grow to `batch`; 0 for `batch` rows at once
    batch: int = 4_608,  # rows in a step
    micro_batches: int = 48,  # parts of a step; what the number of processes must divide
    steps: int = 371_872,  # updates
    warmup: int = 2_760,  # steps to the peak learning rate
    cooldown: int = 0,  # steps at the end in which it falls to 0
    lr: float = 8e-4,  # at its peak
    decay: float = 1e-5,  # of weights in a step at the peak
    dropout: float = 0.1,  # of attention's output
    clip: float = 1.0,  # largest norm of the gradient
    valid_every: int = 4_000,  # steps
) -> Recipe:
    reader = TextReader(tokenizer, max_length=length, windowed=True)
    norm = nn.LayerNorm(width, eps=EPS, bias=False)
    text = Text(reader, width=width, positions=0, types=0, multiple=64, dropout=0.0, norm=norm)
    encoder = modernbert_encoder(
        width, depth, heads, hidden=hidden, every=every, reach=reach, theta=theta, local_theta=local_theta,
        out_dropout=dropout, eps=EPS,
    )  # fmt: skip
    net = Network({"text": text}, encoder)
    view, held_out = (
        View(picks={"word": RandomTokens(role="text", rate=rate)}, corruption=reader.replacement())
        for rate in (hide, valid_hide)
    )
    transform = Transform(width, eps=EPS, bias=False, std=0.02 / math.sqrt(2 * depth))
    objective = OnePass(net, [Predict("word", Vocabulary(text.table, transform=transform), name="mlm")])
    stage = Stage(
        tasks=[Task("mlm", view, objective, held_out=held_out)], data=data, valid=valid, steps=steps, batch=batch,
        micro_batches=micro_batches, clip=clip, valid_every=valid_every, start=[start_of(start)] if start else [],
        ramp=BatchRamp(first=first_batch, steps=growth) if growth else None,
        optimizer=AdamW(
            lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay, decay_by_schedule=True,
            schedule=WSD(warmup=warmup, total=steps, decay=cooldown),
        ),
    )  # fmt: skip
    return Recipe([stage], net)


scales = {
    "tiny": dict(
        width=128, depth=4, heads=4, hidden=192, length=128, reach=16, batch=32, growth=0, micro_batches=1,
        steps=2_000, warmup=100, cooldown=500, lr=1e-3, dropout=0.0, valid_every=500,
    ),
    "base": {},
    "large": dict(
        width=1024, depth=28, heads=16, hidden=2_624, first_batch=448, growth=3_633, batch=4_928, micro_batches=64,
        steps=180_001, warmup=1_453, lr=5e-4,
    ),
}  # fmt: skip
