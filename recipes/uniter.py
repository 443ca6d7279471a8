"""UNITER: one encoder over a caption's words and a picture's regions, with four tasks that take turns.

Paper    Chen et al. 2019, "UNITER: UNiversal Image-TExt Representation Learning", arXiv:1909.11740
Follows  the authors' code (ChenRocks/UNITER): embeddings, tied heads, conditional masking, transport by IPOT, element
         means in MRFR and MRC-kl, tasks 2:2:1:1 as in their in-domain run
Differs  a caption of which no word was picked loses a random word, not its first; tasks come in exact shares, not by
         lot; a batch has a number of rows (theirs: 10,240 tokens with padding); vectors are not decayed, where the
         authors decay some LayerNorms by their names; weights start at random (theirs: from BERT); bytes unless a
         tokenizer is given (theirs: 28,996 cased word pieces)
Expect   not run at paper scale; tiny, on the demo's collages: it finds the right picture of 100 for nearly every
         caption and reads hidden names from the regions they name. That the final states of words and of what they
         name line up takes a larger `wra` than the paper's 0.1, with which they did not: once matching is solved, all
         states of a pair that matches may as well point one way
Run      mmpre train uniter --scale tiny --data collages/train --sidecar collages/regions/train
"""

from mmpre.claims import Against, Claim, Measure
from mmpre.encoder import bert_encoder
from mmpre.evaluation.grounding import Grounding
from mmpre.evaluation.reading import Reading
from mmpre.evaluation.retrieval import PairRetrieval
from mmpre.heads.matching import Matching
from mmpre.heads.region import ClassScores, RegionClass, RegionClassKL, RegionFeature
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.modalities.regions import RegionReader, Regions
from mmpre.modalities.text import Text, TextReader
from mmpre.network import Network
from mmpre.objectives.one_pass import Align, Match, OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Linear
from mmpre.training.optim import AdamW
from mmpre.view import OtherSample, View


def uniter(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a caption and regions
    valid: tuple[str, ...] = (),  # held-out shards
    sidecar: str = "",  # folder of the training shards' region features; "" where the shards hold them
    valid_sidecar: str = "",  # the same for the held-out shards
    tokenizer: str = "bytes",  # path of a tokenizer.json, or bytes
    width: int = 768,  # of the states
    depth: int = 12,  # layers
    heads: int = 12,  # of attention
    length: int = 62,  # tokens of a caption at most, [CLS] and [SEP] included
    positions: int = 512,  # rows of the position table, so that longer texts can be fine-tuned on
    regions: int = 100,  # of a picture at most
    features: int = 2048,  # values of a region's feature
    classes: int = 1601,  # of the detector, 0 is the background
    hide: float = 0.15,  # chance of a token or region to be predicted
    joint: bool = False,  # ablation: hide words and regions at once; the paper hides one side and shows the other
    wra: float = 0.1,  # weight of word-region alignment; 0 leaves it out
    learn: tuple[str, ...] = ("itm", "mlm", "mrfr", "mrckl"),  # ablations: some alone, or mrc in place of mrckl
    batch: int = 3_072,  # rows in a step
    micro_batches: int = 16,  # parts of a step; what the number of processes must divide
    steps: int = 200_000,  # updates
    warmup: int = 10_000,  # steps to the peak learning rate, which then falls linearly to 0
    lr: float = 5e-5,  # at its peak
    decay: float = 0.01,  # of weight matrices
    dropout: float = 0.1,  # everywhere
    clip: float = 5.0,  # largest norm of the gradient
    valid_every: int = 5_000,  # steps
) -> Recipe:
    text = Text(TextReader(tokenizer, max_length=length), width=width, positions=positions, dropout=dropout)
    reader = RegionReader(features, classes, max_regions=regions)
    image = Regions(reader, width=width, types=text.types, dropout=dropout)
    encoder = bert_encoder(width, depth, heads, dropout=dropout, attention_dropout=dropout)
    net = Network({"text": text, "image": image}, encoder)

    word, region = RandomTokens(role="text", rate=hide), RandomTokens(role="image", rate=hide)
    hiding = {"word": text.reader.replacement(), "region": HideAll()}
    both = View(picks={"word": word, "region": region}, corruption=hiding)
    words = View(picks={"word": word}, corruption=hiding)  # the pictures are whole
    seen = View(picks={"region": region}, corruption=hiding)  # the captions are
    pairs = View(donors={"image": OtherSample(share=0.5)})

    match, align = Match("text", Matching(width)), Align(("text", "image"), weight=wra)
    predict_word = Predict("word", Vocabulary(text.table), name="mlm")
    predict_feature = Predict("region", RegionFeature(image.project), name="mrfr")
    scores = ClassScores(width, classes)
    predict_class = Predict("region", RegionClassKL(scores), name="mrckl")
    predict_best = Predict("region", RegionClass(scores), name="mrc")
    tasks = [
        Task("itm", pairs, OnePass(net, [match, align] if wra else [match]), ratio=2),
        Task("mlm", both if joint else words, OnePass(net, [predict_word]), ratio=2, held_out=words),
        Task("mrfr", both if joint else seen, OnePass(net, [predict_feature]), ratio=1, held_out=seen),
        Task("mrckl", both if joint else seen, OnePass(net, [predict_class]), ratio=1, held_out=seen),
        Task("mrc", both if joint else seen, OnePass(net, [predict_best]), ratio=1, held_out=seen),
    ]
    if not learn or set(learn) - {task.name for task in tasks}:
        raise ValueError(f"uniter: learn wants some of itm, mlm, mrfr, mrckl and mrc, got {' '.join(learn) or 'none'}")
    schedule = Linear(warmup=warmup, total=steps)
    stage = Stage(
        tasks=[task for task in tasks if task.name in learn], data=data, sidecar=sidecar or None, valid=valid,
        valid_sidecar=valid_sidecar or None, steps=steps, batch=batch, micro_batches=micro_batches, clip=clip,
        optimizer=AdamW(lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=decay, schedule=schedule),
        valid_every=valid_every,
    )  # fmt: skip
    itm = tasks[0].objective
    evaluations = [Grounding(net, net.readers)]
    if "itm" in learn:
        retrieval = PairRetrieval(lambda batch: match.head(itm.states(match, batch)).diff(dim=1)[:, 0], net.readers)
        evaluations.insert(0, retrieval)
    if "mlm" in learn:
        evaluations.append(Reading(net, predict_word.head, net.readers))
    return Recipe([stage], net, evaluations=evaluations)


scales = {
    "tiny": dict(
        width=96, depth=3, heads=4, regions=8, features=1280, classes=23, batch=32, micro_batches=1, steps=6_000,
        warmup=200, lr=1e-3, dropout=0.0, valid_every=500, wra=1.0,
    ),
    "base": {},
    "large": dict(width=1024, depth=24, heads=16, steps=500_000, batch=7_168, micro_batches=64),
}  # fmt: skip

RETRIEVAL = (Measure("mean rank", less=True), Measure("R@1"))
claim = Claim(
    says="hiding one side teaches more than hiding both at once, and alignment makes words point at what they name",
    against={
        "joint masking": Against(
            numbers={"joint": True},
            measure=(*RETRIEVAL, Measure("mlm: mlm_accuracy"), Measure("mrckl: mrckl_accuracy")),
        ),
        "no WRA": Against(numbers={"wra": 0.0}, measure="word to region accuracy"),
        "no masked regions": Against(numbers={"learn": ("itm", "mlm")}, measure=RETRIEVAL),
        "no matching": Against(  # nor alignment, which goes with it
            numbers={"learn": ("mlm", "mrfr", "mrckl")}, measure=("mlm: mlm_accuracy", "word to region accuracy")
        ),
    },
    quick=dict(steps=1_500, warmup=100),
)
