"""LXMERT: words and regions are read apart, then across, and five things are learned from one pass over both.

Paper    Tan & Bansal 2019, "LXMERT: Learning Cross-Modality Encoder Representations from Transformers",
         arXiv:1908.07490
Follows  the authors' code (airsplay/lxmert): one attention that both sides share in each cross-modality layer, region
         embeddings as the mean of two norms, words and regions hidden at once, sentences replaced for half of the rows,
         labels of all regions weighed by the detector's confidence, smooth L1 on features of hidden regions, sums over
         all regions divided by the share that is hidden, answers on matching rows alone, Adam without bias correction,
         decay of all parameters, 20 epochs in one stage with questions from the start
Differs  rows have as many regions and words as there are (theirs: 36, and 20 with padding); a hidden word's random
         stand-in is no special token; random features of one row come from one other picture; tables of positions and
         types learn their first rows too, which the authors' code freezes by its padding index; steps are 20 epochs of
         9.18 million pairs (not checked against the paper); weights of heads start like all others; a question is a
         member of a picture's sample, shown in place of its caption for `ask` of the rows (theirs: a third of all
         sentences are questions); the first step is made at 1 / (warmup + 1) of the peak rate (theirs: at 0); bytes
         unless a tokenizer is given (theirs: 30,522 word pieces)
Expect   not run at paper scale; on collages, detector and people are stood in for: boxes and names are true, the object
         is the picture shown and its attribute the kind of it, questions come from templates (--questions when they are
         built). tiny: docs/claims/lxmert.md
Run      mmpre train lxmert --scale tiny --data collages/train --sidecar collages/regions/train
"""

from dataclasses import replace
from typing import Literal

from mmpre.claims import Against, Claim, Measure
from mmpre.encoder import two_stream_encoder
from mmpre.evaluation.labelled import Labelled
from mmpre.evaluation.reading import Reading
from mmpre.evaluation.retrieval import PairRetrieval
from mmpre.heads.answers import Answers
from mmpre.heads.detected import SmoothFeature, SureLabel
from mmpre.heads.matching import Matching
from mmpre.heads.region import ClassScores
from mmpre.heads.transform import Transform
from mmpre.heads.vocabulary import Vocabulary
from mmpre.labels import Numbered
from mmpre.masking.everything import Everything
from mmpre.masking.fill import FromOther, Shares, Zero
from mmpre.masking.random import RandomTokens
from mmpre.modalities.regions import BoxedRegions, RegionReader
from mmpre.modalities.text import Questions, Text, TextReader
from mmpre.network import Network
from mmpre.objectives.one_pass import Classify, Match, Means, OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Linear
from mmpre.training.optim import AdamW
from mmpre.view import OtherSample, View


def lxmert(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a caption and regions, and may have a question
    valid: tuple[str, ...] = (),  # held-out shards
    sidecar: str = "",  # folder of the training shards' region features; "" where the shards hold them
    valid_sidecar: str = "",  # the same for the held-out shards
    tokenizer: str = "bytes",  # path of a tokenizer.json, or bytes
    width: int = 768,  # of the states
    language: int = 9,  # layers of the words alone
    relations: int = 5,  # layers of the regions alone
    cross: int = 5,  # layers in which both read each other; 0 joins them at the end alone, for comparison
    heads: int = 12,  # of attention
    length: int = 20,  # tokens of a sentence at most, [CLS] and [SEP] included
    positions: int = 512,  # rows of the position table, so that longer texts can be fine-tuned on
    regions: int = 36,  # of a picture at most
    features: int = 2048,  # values of a region's feature
    objects: int = 1600,  # labels of the detector for what a region shows
    attributes: int = 400,  # labels for what it is like
    answers: int = 9_500,  # that a question may have
    ask: float = 0.33,  # share of the rows that show a question, where the sample has one; 0 leaves questions out
    hide: float = 0.15,  # chance of a token or region to be predicted
    mask: float = 0.8,  # share of the hidden ones that shows nothing; a mask, or zeros
    random: float = 0.1,  # share that shows another word, or a region of another picture
    vision: Literal["both", "labels", "feature", "none"] = "both",  # ablation: what is learned of regions
    batch: int = 256,  # rows in a step
    micro_batches: int = 4,  # parts of a step; what the number of processes must divide
    steps: int = 717_000,  # updates
    warmup: int = 35_850,  # steps to the peak learning rate, which then falls linearly to 0
    lr: float = 1e-4,  # at its peak
    decay: float = 0.01,  # of all parameters
    dropout: float = 0.1,  # everywhere
    clip: float = 1.0,  # largest norm of the gradient
    valid_every: int = 5_000,  # steps
) -> Recipe:
    text = Text(TextReader(tokenizer, max_length=length), width=width, positions=positions, dropout=dropout)
    labels = {"object": objects, "attribute": attributes} if vision in ("both", "labels") else {}
    image = BoxedRegions(RegionReader(features, max_regions=regions, labels=labels), width=width, dropout=dropout)
    encoder = two_stream_encoder(
        width, heads, own={"text": language, "image": relations}, across=cross, dropout=dropout,
        attention_dropout=dropout,
    )  # fmt: skip
    net = Network({"text": text, "image": image}, encoder)

    questions = Questions(text.reader, Numbered(count=answers, suffixes=("answer.json",)), share=ask)
    view = View(
        readers={"text": questions} if ask else {},
        labels={"answer": questions.answer} if ask else {},
        donors={"text": OtherSample(share=0.5, differs_in="image")},
        picks={
            "word": RandomTokens(role="text", rate=hide, at_least_one=False),
            "region": RandomTokens(role="image", rate=hide, at_least_one=False),
            "seen": Everything(role="image"),
        },
        corruption={
            "word": text.reader.replacement(mask, random),
            "region": Shares([(mask, Zero("features")), (random, FromOther("features"))]),
        },
    )

    pool = "text" if cross else Means(("text", "image"))
    match = Match(pool, Matching(width if cross else 2 * width, width))
    words, transform = Vocabulary(text.table), Transform(width)
    learned = [Predict("word", words, name="mlm"), match]
    for name, count in labels.items():
        head = SureLabel(ClassScores(width, count, transform=transform), field=name)
        learned.append(Predict("seen", head, name=name, weight=1 / hide))
    if vision in ("both", "feature"):
        head = SmoothFeature(transform, width, features)
        learned.append(Predict("region", head, name="feature", weight=1 / hide, per="ordinary:region"))
    answer = Classify(pool, Answers(match.head.pool, answers), label="answer", name="qa")
    if ask:
        learned.append(answer)
    task = Task("lxmert", view, OnePass(net, learned))
    schedule = Linear(warmup=warmup, total=steps)
    stage = Stage(
        tasks=[task], data=data, sidecar=sidecar or None, valid=valid, valid_sidecar=valid_sidecar or None,
        steps=steps, batch=batch, micro_batches=micro_batches, clip=clip, valid_every=valid_every,
        optimizer=AdamW(
            lr=lr, betas=(0.9, 0.999), eps=1e-6, weight_decay=decay, decay_vectors=True, bias_correction=False,
            schedule=schedule,
        ),
    )  # fmt: skip

    def score(batch):
        return match.scores(task.objective.states(match, batch), batch).diff(dim=1)[:, 0]

    def told(batch):
        return answer.scores(task.objective.states(answer, batch), batch)

    evaluations = [PairRetrieval(score, net.readers), Reading(net, words, net.readers)]
    if ask:
        asked = replace(questions, share=1.0)
        shown = View(readers={"text": asked}, labels={"answer": asked.answer})  # nothing hidden, nothing exchanged
        evaluations.append(Labelled(told, shown, net.readers, label="answer", name="answers to questions"))
    return Recipe([stage], net, evaluations=evaluations)


scales = {
    "tiny": dict(
        width=96, language=2, relations=1, cross=2, heads=4, length=40, positions=64, regions=16, features=1280,
        objects=140, attributes=22, answers=24, batch=32, micro_batches=1, steps=6_000, warmup=300, lr=1e-3,
        dropout=0.0, valid_every=500,
    ),
    "base": {},
}  # fmt: skip

better = Measure("mean rank", less=True), Measure("R@1"), Measure("answers to questions")
claim = Claim(
    says="learning what regions show helps to match and to answer, and so do layers that read across",
    against={
        "no vision task": Against(numbers={"vision": "none"}, measure=better),
        # so many layers that it has nearly as many weights (84 and 92 squares of the width; 3 and 2 would have 60)
        "late fusion": Against(numbers={"language": 4, "relations": 3, "cross": 0}, measure=better),
    },
    quick=dict(steps=600, warmup=60),
)
