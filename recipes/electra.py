"""ELECTRA: tell which words of a text were put there by a small masked language model.

Paper    Clark et al. 2020, "ELECTRA: Pre-training Text Encoders as Discriminators Rather Than Generators",
         arXiv:2003.10555
Follows  the authors' code (google-research/electra): a generator of the same depth and a share of the width, which
         shares the embeddings; 15 percent of the tokens picked (large: 25), 85 percent of them masked and the others
         kept; samples from its softmax; a loss over all tokens, with a weight of 50; Adam without bias correction
Differs  rows are windows of whole words from one text (theirs: mostly two segments, 5 percent of random length); picked
         tokens are drawn without replacement (in theirs one drawn twice gets the mean of two ids), as a share of the
         ordinary ones (theirs: of all, special ones included); the learning rate warms up and then falls along one line
         (theirs: the line times the warm-up), from 1 / (warmup + 1) of the peak; weights start from a normal
         distribution that is not cut off; bytes unless a tokenizer is given (theirs: 30,522 word pieces); the two
         towers of Electric are left out
Expect   not run at paper scale; its claim, two seeds at scale tiny: docs/claims/electra.md
Run      mmpre train electra --scale tiny --data "text/*.tar"
"""

from typing import Literal

from mmpre.claims import Against, Claim
from mmpre.encoder import bert_encoder
from mmpre.heads.score import Score
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.exact import ExactShare
from mmpre.modalities.text import Text, TextReader
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.objectives.replaced import CopyOrGuess, Detect, Sampled
from mmpre.projected import Projected
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Linear
from mmpre.training.optim import AdamW
from mmpre.view import View


def electra(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a text
    valid: tuple[str, ...] = (),  # held-out shards
    tokenizer: str = "bytes",  # path of a tokenizer.json, or bytes
    width: int = 768,  # of the discriminator's states
    depth: int = 12,  # layers of both networks
    heads: int = 12,  # of the discriminator's attention
    table: int = 768,  # width of the embeddings, which both networks share
    generator_width: int = 256,  # of the generator's states
    generator_heads: int = 4,  # of its attention
    untied_generator: bool = True,  # its layers are its own; False: it is the discriminator's network itself
    untied_generator_embeddings: bool = False,  # its embeddings are its own as well
    length: int = 512,  # tokens in a window at most, [CLS] and [SEP] included
    positions: int = 512,  # rows of the position table, so that longer texts can be fine-tuned on
    hide: float = 0.15,  # share of the tokens that is picked
    mask: float = 0.85,  # share of those that the generator sees as masks
    weight: float = 50.0,  # of the discriminator's loss
    temperature: float = 1.0,  # of the generator's samples
    own: bool = True,  # the generator may draw the right token, which then counts as the text's own
    learn: Literal["all", "picked", "every", "ids", "masked"] = "all",  # ablations: judge picked tokens alone (ELECTRA
    # 15%); predict all ids, copied or guessed (All-Tokens MLM), or those of picked tokens, from samples (Replace MLM)
    # or from masks without a generator (BERT)
    uniform: bool = False,  # ablation: random tokens in place of the generator's
    batch: int = 256,  # rows in a step
    micro_batches: int = 8,  # parts of a step; what the number of processes must divide
    steps: int = 766_000,  # updates
    warmup: int = 10_000,  # steps to the peak learning rate, which then falls linearly to 0
    lr: float = 2e-4,  # at its peak
    decay: float = 0.01,  # of weights, not of biases and LayerNorms
    dropout: float = 0.1,  # everywhere
    clip: float = 1.0,  # largest norm of the gradient
    valid_every: int = 5_000,  # steps
) -> Recipe:
    if untied_generator_embeddings and not untied_generator:
        raise ValueError(
            "electra: a generator that is the discriminator's network has its embeddings; leave "
            "untied_generator_embeddings off, or untied_generator on"
        )
    reader = TextReader(tokenizer, max_length=length, windowed=True)

    def embeddings() -> Text:
        return Text(reader, width=table, positions=max(positions, length), dropout=dropout)

    def network(words: Text, width: int, heads: int) -> Network:
        encoder = bert_encoder(width, depth, heads, dropout=dropout, attention_dropout=dropout)
        return Network({"text": words if width == table else Projected(words, table, width)}, encoder)

    words = embeddings()
    net = network(words, width, heads)
    if learn in ("all", "picked"):
        readout = Detect("text", Score(width), pick="word" if learn == "picked" else None, weight=weight)
    elif learn == "every":
        readout = CopyOrGuess("text", Score(width), Vocabulary(words.table, width=width))
    else:
        readout = Predict("word", Vocabulary(words.table, width=width), name="mlm")
    objective = OnePass(net, [readout])
    if learn == "masked":
        shown = reader.replacement()
    elif uniform:
        shown = reader.replacement(mask=0.0, random=1.0)
    else:
        shown = reader.replacement(mask=mask, random=0.0)
        guessed = embeddings() if untied_generator_embeddings else words
        head = Vocabulary(guessed.table, width=generator_width if untied_generator else width)
        generator = network(guessed, generator_width, generator_heads) if untied_generator else net
        objective = Sampled(generator, "word", head, objective, temperature=temperature, own=own)
    view = View(picks={"word": ExactShare(role="text", share=hide)}, corruption=shown)
    schedule = Linear(warmup=warmup, total=steps)
    stage = Stage(
        tasks=[Task("electra", view, objective)], data=data, valid=valid, steps=steps, batch=batch,
        micro_batches=micro_batches, clip=clip, valid_every=valid_every,
        optimizer=AdamW(
            lr=lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=decay, bias_correction=False, schedule=schedule
        ),
    )  # fmt: skip
    return Recipe([stage], net)


scales = {
    "tiny": dict(
        width=128, depth=4, heads=4, table=64, generator_width=32, generator_heads=2, length=128, positions=128,
        batch=32, micro_batches=1, steps=2_000, warmup=200, lr=1e-3, dropout=0.0, valid_every=500,
    ),
    "small": dict(
        width=256, heads=4, table=128, generator_width=64, generator_heads=1, length=128, batch=128, micro_batches=4,
        steps=1_000_000, lr=5e-4,
    ),
    "base": {},
    "large": dict(
        width=1024, depth=24, heads=16, table=1024, hide=0.25, batch=2_048, micro_batches=64, steps=400_000,
    ),
}  # fmt: skip

claim = Claim(
    says="judging all tokens teaches more than judging picked ones, or random ones, and than predicting masked ones",
    against={
        "picked alone": Against(numbers={"learn": "picked"}, measure="linear probe"),
        "masked words": Against(numbers={"learn": "masked"}, measure="linear probe"),
        "random tokens": Against(numbers={"uniform": True}, measure="linear probe"),
    },
    equal="flops",
    quick=dict(steps=150, warmup=15),
    kinds=("classification",),
)
