"""BERT: predict hidden words of a text.

Paper    Devlin et al. 2018, "BERT: Pre-training of Deep Bidirectional Transformers", arXiv:1810.04805
Follows  the masked language model: 15 percent of word pieces, of those 80 masked, 10 random, 10 kept; sizes, AdamW
Differs  no next-sentence task, and rows are windows of whole words from one text (both as RoBERTa, arXiv:1907.11692);
         one length for the whole run, where the authors train on 128 pieces for nine tenths of it (recipes/
         two_stage.py; `first_length` lets rows grow smoothly); bytes unless a tokenizer is given (theirs: 30,522
         uncased word pieces)
Expect   not run at paper scale
Run      mmpre train bert --scale tiny --data "text/*.tar"
"""

from mmpre.encoder import bert_encoder
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.random import RandomTokens
from mmpre.modalities.text import Text, TextReader
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import LengthRamp, Linear
from mmpre.training.optim import AdamW
from mmpre.view import View


def bert(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a text
    valid: tuple[str, ...] = (),  # held-out shards
    tokenizer: str = "bytes",  # path of a tokenizer.json, or bytes
    width: int = 768,  # of the states
    depth: int = 12,  # layers
    heads: int = 12,  # of attention
    length: int = 512,  # tokens in a window at most, [CLS] and [SEP] included
    first_length: int = 0,  # tokens in a row at first, growing to `length` over `growth` steps; 0 for full rows at once
    growth: int = 0,  # steps
    hide: float = 0.15,  # chance of a token to be predicted
    batch: int = 256,  # rows in a step
    micro_batches: int = 8,  # parts of a step; what the number of processes must divide
    steps: int = 1_000_000,  # updates
    warmup: int = 10_000,  # steps to the peak learning rate, which then falls linearly to 0
    lr: float = 1e-4,  # at its peak
    decay: float = 0.01,  # of weights, not of biases and LayerNorms
    dropout: float = 0.1,  # everywhere
    clip: float = 1.0,  # largest norm of the gradient
    valid_every: int = 5_000,  # steps
) -> Recipe:
    text = Text(TextReader(tokenizer, max_length=length, windowed=True), width=width, dropout=dropout)
    encoder = bert_encoder(width, depth, heads, dropout=dropout, attention_dropout=dropout)
    net = Network({"text": text}, encoder)
    words = View(picks={"word": RandomTokens(role="text", rate=hide)}, corruption=text.reader.replacement())
    task = Task("mlm", words, OnePass(net, [Predict("word", Vocabulary(text.table), name="mlm")]))
    schedule = Linear(warmup=warmup, total=steps)
    stage = Stage(
        tasks=[task], data=data, valid=valid, steps=steps, batch=batch, micro_batches=micro_batches, clip=clip,
        optimizer=AdamW(lr=lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=decay, schedule=schedule),
        valid_every=valid_every,
        length=LengthRamp(first=first_length, last=length, steps=growth) if first_length else None,
    )  # fmt: skip
    return Recipe([stage], net)


scales = {
    "tiny": dict(
        width=128, depth=4, heads=4, length=128, batch=32, micro_batches=1, steps=2_000, warmup=200, lr=1e-3,
        dropout=0.0, valid_every=500,
    ),
    "base": {},
    "large": dict(width=1024, depth=24, heads=16),
}  # fmt: skip
