"""A recipe whose rows are compared over all processes, in parts of unlike number; see uneven.py for its updates."""

from tones import Tones
from torch import nn
from uneven import Descent

from mmpre.encoder import bert_encoder
from mmpre.heads.pool import First, Tower
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.network import Network
from mmpre.objectives.contrast import Contrast, InfoNCE
from mmpre.recipe import Recipe, Stage, Task
from mmpre.view import View


def twins(
    data: tuple[str, ...] = (),  # shards to train on
    valid: tuple[str, ...] = (),  # held-out shards
    steps: int = 6,  # updates
    batch: int = 8,  # rows in a step
    micro_batches: int = 4,  # parts of a step
) -> Recipe:
    net = Network({"tones": Tones(32)}, bert_encoder(32, 2, 2, dropout=0.1))
    tower = Tower(net, First("tones"), nn.Linear(32, 32))
    hidden = View(picks={"note": RandomTokens(role="tones", rate=0.3)}, corruption=HideAll())
    objective = Contrast({"hidden": tower, "whole": tower}, InfoNCE(0.14, learned=True))
    stage = Stage(
        tasks=[Task("twin", {"hidden": hidden, "whole": View()}, objective)], data=data, valid=valid, steps=steps,
        batch=batch, micro_batches=micro_batches, optimizer=Descent(lr=0.05), valid_every=3, max_tokens=12,
    )  # fmt: skip
    return Recipe([stage], net)
