"""MosaicBERT: BERT with ALiBi, gated feed-forwards and twice as many hidden words, on unpadded rows.

Paper    Portes et al. 2023, "MosaicBERT: A Bidirectional Encoder Optimized for Fast Pretraining", arXiv:2312.17482
Follows  the authors' code (mosaicml/examples) and its yaml: 30 percent hidden of which 80 masked, 10 random, 10 kept,
         held-out loss at 15 percent; no positions, no attention dropout, dropout between gate and output; AdamW whose
         decay is multiplied by the schedule alone and reaches every parameter; vocabulary rows a multiple of 64
Differs  rows are windows of whole words (theirs: a document cut off at 128 pieces); LayerNorm in the precision of
         autocast (theirs: bfloat16 by flag); bytes unless a tokenizer is given (theirs: 30,522 uncased word pieces)
Expect   not run at paper scale
Run      mmpre train mosaicbert --scale tiny --data "text/*.tar"
"""

from mmpre.encoder import mosaicbert_encoder
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.random import RandomTokens
from mmpre.modalities.text import Text, TextReader
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Linear
from mmpre.training.optim import AdamW
from mmpre.view import View


def mosaicbert(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a text
    valid: tuple[str, ...] = (),  # held-out shards
    tokenizer: str = "bytes",  # path of a tokenizer.json, or bytes
    width: int = 768,  # of the states
    depth: int = 12,  # layers
    heads: int = 12,  # of attention
    length: int = 128,  # tokens in a window at most, [CLS] and [SEP] included
    alibi: bool = True,  # ablation: learned positions in place of ALiBi
    gated: bool = True,  # ablation: BERT's feed-forward in place of the gated one
    hide: float = 0.3,  # chance of a token to be predicted; BERT's is 0.15
    valid_hide: float = 0.15,  # the same in held-out rows, so that recipes can be compared
    batch: int = 4_096,  # rows in a step
    micro_batches: int = 64,  # parts of a step; what the number of processes must divide
    steps: int = 70_000,  # updates
    warmup: int = 4_200,  # steps to the peak learning rate
    floor: float = 0.02,  # share of the peak to which it then falls linearly
    lr: float = 5e-4,  # at its peak
    decay: float = 1e-5,  # of all parameters in a step at the peak
    dropout: float = 0.1,  # of embeddings, attention's output and inside the feed-forward
    valid_every: int = 2_000,  # steps
) -> Recipe:
    reader = TextReader(tokenizer, max_length=length, windowed=True)
    text = Text(reader, width=width, positions=0 if alibi else None, multiple=64, dropout=dropout)
    net = Network({"text": text}, mosaicbert_encoder(width, depth, heads, dropout=dropout, alibi=alibi, gated=gated))
    view, held_out = (
        View(picks={"word": RandomTokens(role="text", rate=rate)}, corruption=reader.replacement())
        for rate in (hide, valid_hide)
    )
    objective = OnePass(net, [Predict("word", Vocabulary(text.table), name="mlm")])
    schedule = Linear(warmup=warmup, total=steps, floor=floor)
    stage = Stage(
        tasks=[Task("mlm", view, objective, held_out=held_out)], data=data, valid=valid, steps=steps, batch=batch,
        micro_batches=micro_batches, valid_every=valid_every,
        optimizer=AdamW(
            lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay, decay_vectors=True, decay_by_schedule=True,
            schedule=schedule,
        ),
    )  # fmt: skip
    return Recipe([stage], net)


scales = {
    "tiny": dict(
        width=128, depth=4, heads=4, batch=32, micro_batches=1, steps=2_000, warmup=120, lr=1e-3, dropout=0.0,
        valid_every=500,
    ),
    "base": {},
    "large": dict(width=1024, depth=24, heads=16, lr=2e-4),
}  # fmt: skip
