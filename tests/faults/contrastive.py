"""A recipe whose rows are compared with each other: a melody and its hidden twin among all rows of the step."""

from tones import Tones
from torch import nn

from mmpre.encoder import bert_encoder
from mmpre.heads.pool import First, Tower
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.network import Network
from mmpre.objectives.contrast import Contrast, InfoNCE
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Linear
from mmpre.training.optim import AdamW
from mmpre.view import View


def contrastive(
    data: tuple[str, ...] = (),  # shards to train on
    valid: tuple[str, ...] = (),  # held-out shards
    width: int = 32,  # of the states
    steps: int = 60,  # updates
    batch: int = 16,  # rows in a step
    micro_batches: int = 4,  # parts of a step
    lr: float = 1e-3,  # at its peak
) -> Recipe:
    net = Network({"tones": Tones(width)}, bert_encoder(width, 2, 2, dropout=0.1))
    tower = Tower(net, First("tones"), nn.Linear(width, width))
    views = {
        "hidden": View(picks={"note": RandomTokens(role="tones", rate=0.3)}, corruption=HideAll()),
        "whole": View(),
    }
    objective = Contrast({"hidden": tower, "whole": tower}, InfoNCE(0.14, learned=True))
    optimizer = AdamW(lr=lr, schedule=Linear(warmup=5, total=steps))
    stage = Stage(
        tasks=[Task("twin", views, objective)], data=data, valid=valid, steps=steps, batch=batch,
        micro_batches=micro_batches, optimizer=optimizer, valid_every=12,
    )  # fmt: skip
    return Recipe([stage], net)
