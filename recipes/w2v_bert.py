"""w2v-BERT: learn a codebook of speech by contrast half-way up a network, and predict its codes at the end.

Paper    Chung et al. 2021, "W2v-BERT: Combining Contrastive Learning and Masked Language Modeling for Self-Supervised
         Speech Pre-Training", arXiv:2108.06209; scale v2: w2v-BERT 2.0 of Seamless, arXiv:2312.05187
Follows  the paper's XL (base) and XXL: 80 mel bands, two convolutions to 25 Hz; spans of 10 tokens that start with a
         chance of 0.065, hidden by random vectors; 12 conformer layers, then a contrast with 100 distractors of the
         utterance; 12 or 30 layers more, then the code's number; 1,024 codes, drawn by Gumbel's noise from unhidden
         features; both losses with weight 1, diversity with 0.1; Adam at 2e-3, inverse square root. v2 as fairseq2's
         600m: 2 frames a token, a learned vector hides, 8 + 16 layers, causal convolutions, contrast in 768 values
Differs  diversity is that of a micro-batch (public code: of a device's batch); a LayerNorm in convolutions (theirs:
         batch norm) and before the projection; positions are relative keys, 64 places
         back and 8 ahead at most (v2's; XL's and XXL's are not told); Adam in place of XXL's Adafactor, with its
         betas, 0.9 and 0.98 (XL's are not told); the temperature falls with updates; v2 draws its spans like the others
         (fairseq2: as many in all rows of a batch). Not told, so chosen: the convolutions' channels, no dropout, no
         clipping, at least two hidden tokens a row; batch, steps and rate of v2, which are XL's
Expect   not run at paper scale; its claim, a first look: docs/claims/w2v_bert.md
Run      mmpre train w2v_bert --scale tiny --data "speech/*.tar"
"""

from mmpre.claims import Against, Claim
from mmpre.data.audio import Audio
from mmpre.encoder import conformer_encoder
from mmpre.evaluation.codes import OwnCodesUse
from mmpre.gumbel import GumbelCodes
from mmpre.masking.corrupt import HideAll
from mmpre.masking.spans import StartedSpans
from mmpre.modalities.speech import FbankReader, FrameConvolutions, Speech
from mmpre.network import Network
from mmpre.objectives.own_codes import OwnCodes
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import ExponentialRamp, InverseSqrt
from mmpre.training.optim import AdamW
from mmpre.view import View


def w2v_bert(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a recording
    valid: tuple[str, ...] = (),  # held-out shards
    seconds: float = 15.0,  # of an utterance at most; longer recordings are cut into windows
    stack: int = 4,  # mel frames of 10 ms in a token
    channels: tuple[int, ...] = (128, 32),  # of convolutions over frames and bands, each halving both; () for none
    noise: float = 0.1,  # deviation of the random vectors that hide tokens; 0 hides them by a learned one
    width: int = 1024,  # of the states
    depth: int = 12,  # layers before the contrast
    more_depth: int = 12,  # layers after it
    heads: int = 8,  # of attention
    kernel: int = 5,  # of the layers' convolutions
    causal: bool = False,  # whether these look back alone
    start: float = 0.065,  # chance of a token to start a span that is hidden
    span_ms: float = 400.0,  # milliseconds of a span
    codes: int = 1_024,  # in a codebook
    values: int = 1_024,  # of a code, all codebooks together
    groups: int = 1,  # codebooks
    compare: int = 0,  # width in which states and codes are contrasted; 0 for their own
    distractors: int = 100,  # other hidden tokens of the utterance that a token's code shall be told from
    kappa: float = 0.1,  # what cosines are divided by
    contrast: float = 1.0,  # weight of that loss; 0 leaves it out
    diversity: float = 0.1,  # weight of the loss from codes that are used unequally
    predict: float = 1.0,  # weight of predicting codes; 0 leaves it out: with no more_depth the paper's w2v-Conformer
    through: bool = False,  # ablation: codes learn from being predicted, too
    hottest: float = 2.0,  # temperature of the drawn codes at first
    coldest: float = 0.1,  # which it does not fall below
    cooling: float = 0.999995,  # what it is multiplied by with each update
    dropout: float = 0.0,  # everywhere in the encoder
    batch: int = 2_048,  # utterances in a step
    micro_batches: int = 128,  # parts of a step; what the number of processes must divide
    steps: int = 400_000,  # updates
    warmup: int = 25_000,  # steps to the peak learning rate, which then falls with the root of the step
    lr: float = 2e-3,  # at its peak
    clip: float | None = None,  # largest norm of the gradient
    valid_every: int = 5_000,  # steps
) -> Recipe:
    reader = FbankReader(Audio(seconds=seconds, windowed=True), stack=stack)
    front = FrameConvolutions(channels, stack=stack, bins=reader.bins) if channels else None
    speech = Speech(reader, width=width, convolutions=front, noise=noise)
    encoder = conformer_encoder(width, depth + more_depth, heads, kernel=kernel, causal=causal, dropout=dropout)
    net = Network({"speech": speech}, encoder)
    heat = ExponentialRamp(first=hottest, last=coldest, factor=cooling)
    book = GumbelCodes(speech.project.in_features, codes, values, groups=groups, temperature=heat)
    objective = OwnCodes(
        net, "span", book, tap=depth, width=width, compare=compare, distractors=distractors, kappa=kappa,
        contrast=contrast, diversity=diversity, predict=predict, through=through,
    )  # fmt: skip
    length = reader.tokens_in(span_ms)
    spans = StartedSpans(role="speech", chance=start, length=length, at_least=2)  # two leave each a distractor
    view = View(picks={"span": spans}, corruption=HideAll())
    stage = Stage(
        tasks=[Task("w2v_bert", view, objective)], data=data, valid=valid, steps=steps, batch=batch,
        micro_batches=micro_batches, clip=clip, valid_every=valid_every,
        optimizer=AdamW(lr=lr, betas=(0.9, 0.98), weight_decay=0.0, schedule=InverseSqrt(warmup=warmup)),
    )  # fmt: skip
    return Recipe([stage], net, evaluations=[OwnCodesUse(objective, view)])


scales = {
    "tiny": dict(  # as v2
        seconds=6.0, stack=2, channels=(), noise=0.0, span_ms=200.0, width=128, depth=2, more_depth=2, heads=4,
        kernel=15, causal=True, codes=64, values=64, compare=64, distractors=50, batch=32, micro_batches=1, steps=1_000,
        warmup=50, lr=1e-3, clip=1.0, valid_every=250,
    ),
    "base": {},  # the paper's XL
    "xxl": dict(more_depth=30),
    "v2": dict(
        stack=2, channels=(), noise=0.0, span_ms=200.0, depth=8, more_depth=16, heads=16, kernel=31, causal=True,
        compare=768,
    ),
}  # fmt: skip

claim = Claim(
    says="without the contrast the codebook collapses, and codes predicted on top tell more of what is said",
    against={
        "no contrast": Against(numbers={"contrast": 0.0, "through": True}, measure="codebook soft perplexity"),
        "contrast alone": Against(  # given --on asterisk's prompts
            numbers={"predict": 0.0, "depth": 4, "more_depth": 0},
            measure="the same prompt in another language: wav to wav R@10",
        ),
    },
    quick=dict(width=64, batch=8, steps=300, warmup=60, lr=2e-3),
    kinds=("retrieval",),
)
