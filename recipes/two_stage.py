"""BERT in two stages: short windows for nine tenths of the steps, then long ones.

Paper    Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers", arXiv:1810.04805, appendix A.2
Follows  as recipes/bert.py, with 128 pieces for 90 percent of the steps and 512 for the rest, as many rows in a batch
Differs  as recipes/bert.py; the learning rate warms up again for the long windows, to a peak of its own, and the
         optimizer starts anew, as You et al. 2019 (arXiv:1904.00962) re-warm their second stage: the authors' run goes
         on along one line
Expect   not run at paper scale
Run      mmpre train two_stage --scale tiny --data "text/*.tar"
"""

from mmpre.encoder import bert_encoder
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.random import RandomTokens
from mmpre.modalities.text import Text, TextReader
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Linear
from mmpre.training.optim import AdamW
from mmpre.view import View


def two_stage(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a text
    valid: tuple[str, ...] = (),  # held-out shards
    tokenizer: str = "bytes",  # path of a tokenizer.json, or bytes
    width: int = 768,  # of the states
    depth: int = 12,  # layers
    heads: int = 12,  # of attention
    short: int = 128,  # tokens in a window of the first stage at most, [CLS] and [SEP] included
    long: int = 512,  # the same for the second stage
    hide: float = 0.15,  # chance of a token to be predicted
    short_batch: int = 256,  # rows in a step of the first stage
    long_batch: int = 256,  # the same for the second stage
    micro_batches: int = 8,  # parts of a step; what the number of processes must divide
    short_steps: int = 900_000,  # updates of the first stage
    long_steps: int = 100_000,  # updates of the second stage
    short_warmup: int = 10_000,  # steps to the peak learning rate, which then falls linearly to 0
    long_warmup: int = 1_000,  # the same for the second stage
    short_lr: float = 1e-4,  # at its peak, in the first stage
    long_lr: float = 5e-5,  # the same for the second stage
    decay: float = 0.01,  # of weights, not of biases and LayerNorms
    dropout: float = 0.1,  # everywhere
    clip: float = 1.0,  # largest norm of the gradient
    valid_every: int = 5_000,  # steps
) -> Recipe:
    text = Text(TextReader(tokenizer, max_length=long, windowed=True), width=width, dropout=dropout)
    encoder = bert_encoder(width, depth, heads, dropout=dropout, attention_dropout=dropout)
    net = Network({"text": text}, encoder)
    predict = Predict("word", Vocabulary(text.table), name="mlm")  # one head for both stages

    def stage(reader: TextReader, batch: int, steps: int, warmup: int, lr: float) -> Stage:
        words = View(
            readers={"text": reader}, picks={"word": RandomTokens(role="text", rate=hide)},
            corruption=reader.replacement(),
        )  # fmt: skip
        task = Task("mlm", words, OnePass(net, [predict]))
        schedule = Linear(warmup=warmup, total=steps)
        return Stage(
            tasks=[task], data=data, valid=valid, steps=steps, batch=batch, micro_batches=micro_batches, clip=clip,
            optimizer=AdamW(lr=lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=decay, schedule=schedule),
            valid_every=valid_every,
        )  # fmt: skip

    shorter = TextReader(tokenizer, max_length=short, windowed=True)
    stages = [
        stage(shorter, short_batch, short_steps, short_warmup, short_lr),
        stage(text.reader, long_batch, long_steps, long_warmup, long_lr),
    ]
    return Recipe(stages, net)


scales = {
    "tiny": dict(
        width=128, depth=4, heads=4, short=64, long=256, short_batch=32, long_batch=8, micro_batches=1,
        short_steps=1_800, long_steps=200, short_warmup=200, long_warmup=20, short_lr=1e-3, long_lr=5e-4, dropout=0.0,
        valid_every=500,
    ),
    "base": {},
    "large": dict(width=1024, depth=24, heads=16),
}  # fmt: skip
