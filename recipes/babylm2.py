"""GPT-BERT: one model that predicts the next word and hidden ones, which won the second BabyLM challenge.

Paper    Hu et al. 2024, "Findings of the Second BabyLM Challenge", arXiv:2412.05149; its winner: Charpentier & Samuel
         2024, "GPT or BERT: why not both?", arXiv:2410.24159
Follows  the authors' code (ltgoslo/gpt-bert): a word, hidden or next, is always predicted from the place before it; of
         16 rows 15 are masked and read both ways, 1 is causal, by the row's number in the step, and each kind's mean
         loss has its share; spans of 1 to 3 pieces, 30 percent hidden at first and 15 in the end, 80 masked, 10 random,
         10 kept, alike for a span; gated attention, disentangled distances, averages of all sublayers; z-loss; LAMB, a
         cosine with cooldown, averaged weights; rows of 128, then 256 (from 70 percent), then 512 pieces (from 90), a
         batch of as many tokens, which grows fourfold over the run
Differs  rows are windows of whole words between [CLS] and [SEP] (theirs: full rows of several segments, without an
         end); spans are drawn evenly (theirs: rarely hidden tokens first, by counters that are carried along); the
         first warm-up steps begin at 1 / (warmup + 1) of the peak; the track of images with text and its baselines
         (GIT, Flamingo) are left out; layers were held against the equations, written in the tests, and published
         numbers of parameters, not against the authors' code; bytes unless a tokenizer is given
Expect   not run at paper scale; tiny, a first look: docs/claims/babylm2.md
Run      mmpre train babylm2 --scale tiny --data "text/*.tar"
"""

from torch import nn

from mmpre.attention import Causal
from mmpre.claims import Against, Claim, Measure
from mmpre.dropout import Dropout
from mmpre.encoder import ltgbert_encoder
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.corrupt import BertReplace
from mmpre.masking.everything import Everything
from mmpre.masking.schedule import Line
from mmpre.masking.units import RandomLengths, WholeUnits
from mmpre.modalities.text import Text, TextReader
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.runs.starts import Carry
from mmpre.schedules import BatchRamp, Cosine
from mmpre.training.average import Average
from mmpre.training.optim import LAMB
from mmpre.view import Dealt, View


def babylm2(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a text
    valid: tuple[str, ...] = (),  # held-out shards
    tokenizer: str = "bytes",  # path of a tokenizer.json, or bytes
    width: int = 768,  # of the states
    depth: int = 12,  # layers
    heads: int = 12,  # of attention
    hidden: int = 2_560,  # inner width of the feed-forwards
    length: int = 128,  # tokens in a window of the first stage; those of the others are two and four times as long
    masked: int = 15,  # of the rows of a turn; 0 trains a causal model alone
    causal: int = 1,  # of the rows of a turn; 0 trains a masked model alone
    first_hide: float = 0.30,  # share of the tokens that is hidden at first
    last_hide: float = 0.15,  # and in the end
    z: float = 1e-4,  # weight of the z-loss
    batch: int = 32_768,  # rows in the last step, if it were one of the first stage
    growth: int = 4,  # times that the batch grows over the run
    micro_batches: int = 128,  # parts of a step; what the number of processes must divide
    steps: int = 15_625,  # updates
    warmup: int = 250,  # steps to the peak learning rate, which falls by half a cosine to a tenth
    cooldown: int = 250,  # last steps, in which the rate falls linearly to 0
    lr: float = 1e-2,  # at its peak
    decay: float = 0.1,  # of weights and averages' shares, not of biases and norms
    dropout: float = 0.1,  # everywhere
    average: float = 0.999,  # of the averaged weights; how much of them a step leaves
    clip: float = 2.0,  # largest norm of the gradient
    valid_every: int = 1_000,  # steps
) -> Recipe:
    reader, std = TextReader(tokenizer, max_length=4 * length, windowed=True), (2 / (5 * width)) ** 0.5
    norm = nn.LayerNorm(width, eps=1e-5, elementwise_affine=False)  # without weights, so one serves all
    text = Text(reader, width=width, positions=0, types=0, dropout=dropout, norm=norm)
    net = Network(
        {"text": text},
        ltgbert_encoder(width, depth, heads, hidden=hidden, dropout=dropout, attention_dropout=dropout),
    )
    dense = nn.Linear(width, width)
    for weight in (text.table.weight, dense.weight):
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
    nn.init.zeros_(dense.bias)
    transform = nn.Sequential(norm, dense, nn.GELU(), norm, Dropout(dropout))
    head, turn = Vocabulary(text.table, transform=transform, z=z), masked + causal
    shares = {"masked": masked, "causal": causal}
    readouts = [Predict(kind, head, before=1, weight=n / turn) for kind, n in shares.items()]

    def stage(number: int, first: int, last: int) -> Stage:
        """Steps `first` to `last`; rows are twice as long for each stage before, and half as many."""
        cut = TextReader(tokenizer, max_length=length << number, windowed=True)
        made = dict(readers={"text": cut}, cuts={"text": RandomLengths((1, 2, 3))})
        share = Line(first_hide + (last_hide - first_hide) * first / steps, last_hide, max(1, steps - first))
        spans = WholeUnits(role="text", share=share, unit="span", past=True)
        replace = BertReplace(mask_id=cut.vocabulary.mask, random_ids=cut.vocabulary.free, unit="span")
        views = {
            "masked": View(picks={"masked": spans}, corruption=replace, **made),
            "causal": View(picks={"causal": Everything(role="text")}, attend=Causal(), **made),
        }
        view = Dealt({kind: (n, views[kind]) for kind, n in shares.items()}, label="causal")
        held_out = Dealt({kind: (1, views[kind]) for kind in shares}, label="causal")  # whatever was trained on

        def rows(step: int) -> int:
            grown = (batch >> number) * (1 + (growth - 1) * step / steps) / growth
            return max(1, round(grown / micro_batches)) * micro_batches

        return Stage(
            tasks=[Task("hybrid", view, OnePass(net, readouts), held_out=held_out)], data=data, valid=valid,
            steps=last - first, batch=rows(last),
            ramp=BatchRamp(first=rows(first), steps=last - first) if growth > 1 else None,
            micro_batches=micro_batches, clip=clip, valid_every=valid_every,
            carry=Carry(optimizer=True, schedule=True) if number else Carry(),
            optimizer=LAMB(
                lr=lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=decay, decay_vectors=True, no_decay=("bias", "norm"),
                schedule=Cosine(warmup=warmup, total=steps, floor=0.1, cooldown=cooldown),
            ),
        )  # fmt: skip

    ends = [0, steps * 7 // 10, steps * 9 // 10, steps]
    stages = [stage(number, ends[number], ends[number + 1]) for number in range(3)]
    fewest = min(size for one in stages for size in (one.batch_at(0)[1], one.batch))
    if masked and causal and fewest < turn:
        raise ValueError(
            f"babylm2: masked and causal rows take turns over {turn} rows, and a step may have {fewest}; use a larger "
            "batch, or fewer masked rows to a causal one"
        )
    return Recipe(stages, net, modules={"average": Average(nn.ModuleDict({"net": net, "head": head}), average)})


scales = {
    "tiny": dict(
        width=128, depth=4, heads=4, hidden=384, length=64, masked=3, batch=64, growth=1, micro_batches=1, steps=2_000,
        warmup=100, cooldown=100, dropout=0.0, average=0.99, valid_every=500,
    ),
    "small": dict(width=384, heads=6, hidden=1_280, lr=1.41e-2, steps=7_812, warmup=125, cooldown=125),
    "base": {},
}  # fmt: skip

claim = Claim(
    says="masked and causal rows together make one model that is good at both",
    against={
        "masked alone": Against(
            numbers={"causal": 0},
            measure=(
                Measure("hybrid: causal", less=True), Measure("hybrid: masked", less=True, margin=0.1),
                Measure("right number", margin=0.01), Measure("right order", margin=0.01),
            ),
        ),
        "causal alone": Against(
            numbers={"masked": 0},
            measure=(Measure("hybrid: masked", less=True), Measure("hybrid: causal", less=True, margin=0.3)),
        ),
    },
    quick=dict(steps=150, warmup=10, cooldown=10, batch=32),
    kinds=("minimal pairs",),
)  # fmt: skip
