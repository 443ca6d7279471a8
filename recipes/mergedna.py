"""MergeDNA: learn which neighbouring bases belong together, and reconstruct them, masked where merging was hard.

Paper    Li et al. 2025, "MergeDNA: Context-aware Genome Modeling with Dynamic Tokenization through Token Merging",
         arXiv:2511.14806 (AAAI 2026)
Follows  the paper's method: four parts of Llama's layers (4, 20, 4 and 2; 51, 253, 51 and 25 M parameters), windows of
         16 bases in which each layer merges neighbours by a grouping map of its own, about half of the bases left (a
         normal draw, cut off at 0.4 and 0.6), ToMe's matching in the latent encoder down to half of these, the three
         losses with weights 1, 1/4 and 1, masks drawn by 1 / g^2; 4,096 bases, AdamW, 10,000 of 100,000 steps of
         warm-up, no official code being public
Differs  where the text is silent: the best pairs of a window are taken one after the other; the choice is hard, and its
         softmax (at 0.1) gives the grouping map a gradient; the latent encoder compares states, not keys; attention
         adds the logarithm of sizes to scores, and a merged token stands where its first base does; the deviation of
         the draw is 0.05; the loss of masks is divided by the number of merged tokens that a step is to mask, which
         rounding in its rows may miss by a few. Heads (16) and the inner width (2,752) follow from the parameters. Half
         of the windows are read on the other strand (`reverse`); the claim compares ways at equal FLOPs, not wall time.
         Scores are given to N and three special ids too, and N is a base to be restored (theirs: A, C, G and T).
         Merging was held against ToMe's equations as written in the tests, not against its code
Expect   not run at paper scale; tiny, a first look: docs/claims/mergedna.md
Run      mmpre train mergedna --scale tiny --data "genomes/*.tar"
         mmpre claim mergedna --data pyrodigal/train --valid pyrodigal/valid --on pyrodigal/frames
         mmpre claim mergedna --quick --data pyrodigal/train --valid pyrodigal/valid --on pyrodigal/frames
"""

from typing import Literal

from torch import nn

from mmpre.claims import Against, Claim
from mmpre.encoder import llama_encoder, merging_encoder
from mmpre.evaluation.hidden import HiddenTokens
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.corrupt import HideAll
from mmpre.masking.exact import ExactShare
from mmpre.modalities.dna import Dna, DnaReader
from mmpre.network import Network
from mmpre.objectives.merged import DrawnShare, MergedReconstruction
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Cosine
from mmpre.training.optim import AdamW
from mmpre.view import View


def mergedna(
    data: tuple[str, ...] = (),  # shards to train on; each sample has a sequence
    valid: tuple[str, ...] = (),  # held-out shards
    length: int = 4096,  # bases of a window that is a row
    width: int = 1024,  # of the states
    local: int = 4,  # layers of the local encoder
    latent: int = 20,  # of the latent encoder
    latent_decoder: int = 4,  # of the latent decoder
    local_decoder: int = 2,  # of the local decoder
    heads: int = 16,  # of attention
    hidden: int = 2752,  # inner width of feed-forward
    window: int = 16,  # bases that the local parts see at once
    group: int = 64,  # width of the vectors by which neighbours are compared
    temperature: float = 0.1,  # of the softmax over pairs
    left: float = 0.5,  # share of the bases that the local encoder leaves, on the average
    spread: float = 0.05,  # deviation of that share
    least: float = 0.4,  # the lowest such share
    most: float = 0.6,  # the highest
    left_latent: float = 0.5,  # share of these that the latent encoder leaves, and that is masked
    latent_weight: float = 0.25,  # of the loss through the latent encoder's merges
    learn: Literal["all", "uniform", "bytes"] = "all",  # ablations: masks that are drawn evenly; masked bases without
    # merging, by as many layers as both encoders have
    hide: float = 0.15,  # of the bases, where nothing is merged, and in evaluation
    reverse: float = 0.5,  # chance of a window to be read on the other strand
    batch: int = 256,  # rows in a step
    micro_batches: int = 32,  # parts of a step; what the number of processes must divide
    steps: int = 100_000,  # updates
    warmup: int = 10_000,  # steps to the peak learning rate, which then falls by half a cosine to 0
    lr: float = 1e-4,  # at its peak
    decay: float = 1e-8,  # of weights, not of biases and norms
    clip: float = 1.0,  # largest norm of the gradient
    valid_every: int = 2_000,  # steps
) -> Recipe:
    reader = DnaReader(length=length, reverse=reverse, ends=False)
    dna = Dna(reader, width=width)
    head = Vocabulary(nn.Embedding(reader.cutter.size, width), transform=nn.Identity())
    nn.init.normal_(head.table.weight, std=0.02)
    masked = View(picks={"base": ExactShare(role="dna", share=hide)}, corruption=HideAll())
    if learn == "bytes":
        net, view = Network({"dna": dna}, llama_encoder(width, local + latent, heads, hidden=hidden)), masked
        objective = OnePass(net, [Predict("base", head, name="masked")])
    else:
        depths = (local, latent, latent_decoder, local_decoder)
        merging = merging_encoder(
            width, depths, heads, hidden=hidden, window=window, group=group, share=left, temperature=temperature
        )
        net, view = Network({"dna": dna}, merging), View()
        objective = MergedReconstruction(
            net, "dna", head, shares=DrawnShare(mean=left, deviation=spread, low=least, high=most), latent=left_latent,
            latent_weight=latent_weight, adaptive=learn == "all",
        )  # fmt: skip
    stage = Stage(
        tasks=[Task("mergedna", view, objective)], data=data, valid=valid, steps=steps, batch=batch,
        micro_batches=micro_batches, clip=clip, valid_every=valid_every,
        optimizer=AdamW(lr=lr, betas=(0.9, 0.95), weight_decay=decay, schedule=Cosine(warmup=warmup, total=steps)),
    )  # fmt: skip
    return Recipe([stage], net, evaluations=[HiddenTokens(net, head, masked, name="masked bases", order=5)])


scales = {
    "tiny": dict(
        length=192, width=64, local=3, latent=3, latent_decoder=1, local_decoder=1, heads=4, hidden=176, group=16,
        batch=32, micro_batches=1, steps=2_000, warmup=200, lr=2e-3, decay=0.01, valid_every=500,
    ),
    "base": {},
}  # fmt: skip

MEASURES = ("reading frame, by place modulo 3: linear probe", "reading frame: linear probe", "masked bases")

claim = Claim(
    says="merging, latent merging and adaptive masks together teach more than masked bases, and than even masks",
    against={
        "masked bases": Against(numbers={"learn": "bytes"}, measure=MEASURES),
        "even masks": Against(numbers={"learn": "uniform"}, measure=MEASURES),
    },
    equal="flops",
    quick=dict(steps=60, warmup=10),
    kinds=("classification",),
)
