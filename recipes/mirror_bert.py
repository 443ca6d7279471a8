"""Mirror-BERT: a text shall know itself under dropout and with a few characters erased, in fifty steps.

Paper    Liu et al. 2021, "Fast, Effective, and Self-Supervised: Transforming Masked Language Models into Universal
         Lexical and Sentence Encoders", arXiv:2104.08027
Follows  the authors' code (cambridgeltl/mirror-bert): no projection head; each text twice, one of the two with 5
         neighbouring characters in place of which a mask stands; NT-Xent over cosines, so that negatives come from both
         sides; AdamW at a constant rate, decay on everything, no warm-up, no clipping; dropout, or dropped heads
Differs  the mean is taken of a text's own pieces alone, or with `--pool mean_std` of [CLS], [SEP] and [MASK] as well
         (the authors' `mean` takes in padding up to 50 places, and changes with it: there is none here); the characters
         are erased where they were drawn (theirs: at their first occurrence); one that lost all heads keeps them
         (theirs: division by 0); with `roberta` the vocabulary's mask is inserted (theirs: the letters of BERT's, which
         RoBERTa takes for text), and norms keep BERT's epsilon; deduplicate the texts: equal ones of a step are pushed
         apart
Expect   not run at paper scale; its claim, a first look: docs/claims/mirror_bert.md. There each arm is measured at the
         layer, and centred or not, as is best for it on valid, not with the pooling that it was trained with
Run      mmpre train mirror_bert --scale tiny --start runs/bert --data "text/*.tar"
"""

from typing import Literal

from mmpre.claims import Against, Before, Claim
from mmpre.encoder import bert_encoder
from mmpre.exchange.imports import start_of
from mmpre.heads.pool import First, Mean, Tower
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.random import RandomTokens
from mmpre.modalities.text import ErasedText, Text, TextReader
from mmpre.network import Network
from mmpre.objectives.contrast import Contrast, NTXent
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.runs.starts import FromRun
from mmpre.schedules import Constant
from mmpre.training.optim import AdamW
from mmpre.view import View


def mirror_bert(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a text, no two the same
    valid: tuple[str, ...] = (),  # held-out shards
    start: str = "",  # folder of a run, or of a model of transformers, that the weights come from; "" for new ones
    tokenizer: str = "bytes",  # path of a tokenizer.json, or bytes; that of the start
    width: int = 768,  # of the states
    depth: int = 12,  # layers
    heads: int = 12,  # of attention
    length: int = 50,  # tokens of a text at most, [CLS] and [SEP] included
    positions: int = 512,  # rows of the position table, as many as the start has
    erase: int = 5,  # characters that the second view lacks; 0 for none
    least: int = 30,  # texts of fewer characters stay whole
    pool: Literal["mean", "mean_std", "first"] = "mean",  # one vector: the mean of the pieces; that with [CLS], [SEP]
    # and masks, which the authors call mean_std; or the state of [CLS]
    temperature: float = 0.04,  # that cosines are divided by
    dropout: float = 0.1,  # everywhere
    head_dropout: float = 0.0,  # chance of a head to be left out of a row; the paper's other way, with a dropout of 0
    batch: int = 200,  # texts in a step, all compared with each other
    micro_batches: int = 4,  # parts of a step; what the number of processes must divide
    learn: Literal["itself", "words"] = "itself",  # "words" is what it is held against: the start, a run of bert, goes
    # on predicting hidden words
    steps: int = 50,  # updates; many more do harm
    lr: float = 2e-5,  # constant
    decay: float = 0.01,  # of everything
    valid_every: int = 10,  # steps
) -> Recipe:
    reader = TextReader(tokenizer, max_length=length)
    text = Text(reader, width=width, positions=positions, dropout=dropout)
    encoder = bert_encoder(
        width, depth, heads, dropout=dropout, attention_dropout=dropout, head_dropout=head_dropout
    )  # fmt: skip
    net = Network({"text": text}, encoder)
    tower = Tower(net, First("text") if pool == "first" else Mean("text", special=pool == "mean_std"))
    erased = View(readers={"text": ErasedText(reader, erase, least)}) if erase else View()
    starts = [start_of(start)] if start else []
    task = Task(
        "mirror", {"whole": View(), "erased": erased},
        Contrast({"whole": tower, "erased": tower}, NTXent(temperature), name="mirror"),
    )  # fmt: skip
    if learn == "words":
        view = View(picks={"word": RandomTokens(role="text", rate=0.15)}, corruption=reader.replacement())
        task = Task("mlm", view, OnePass(net, [Predict("word", Vocabulary(text.table), name="mlm")]))
        starts += [FromRun(run=start, source="tasks.mlm.readouts.0.head")] if start else []
    stage = Stage(
        tasks=[task], data=data, valid=valid, steps=steps, batch=batch, micro_batches=micro_batches,
        valid_every=valid_every, start=starts,
        optimizer=AdamW(lr=lr, weight_decay=decay, decay_vectors=True, schedule=Constant()),
    )  # fmt: skip
    return Recipe([stage], net)


scales = {
    "tiny": dict(width=128, depth=4, heads=4, length=64, positions=128, batch=100, micro_batches=1, lr=1e-4),
    "base": {},
    "drophead": dict(dropout=0.0, head_dropout=0.2),
    "roberta": dict(dropout=0.0, head_dropout=0.05, pool="first"),
    "words": dict(length=25, erase=0, pool="first", temperature=0.2, steps=100),
}  # fmt: skip

claim = Claim(
    says="fifty steps in which texts know themselves make a masked language model tell what is near to what",
    against={
        "the start alone": Against(numbers={"lr": 1e-12, "steps": 1}, measure="Spearman"),
        "more masked words": Against(numbers={"learn": "words"}, measure="Spearman"),
        "new weights": Against(numbers={"start": ""}, measure="Spearman"),  # the same steps, from random weights
        "new weights alone": Against(numbers={"start": "", "lr": 1e-12, "steps": 1}, measure="Spearman"),
        "no dropout": Against(numbers={"dropout": 0.0}, measure="Spearman"),
        "nothing erased": Against(numbers={"erase": 0}, measure="Spearman"),
    },
    equal="flops",
    numbers=dict(valid_every=50),
    quick=dict(valid_every=50),
    before=Before(
        number="start", recipe="bert", numbers=dict(steps=1_000, warmup=100, batch=128),
        quick=dict(steps=400, warmup=40, batch=64),
    ),
    kinds=("similarity",),
)  # fmt: skip
