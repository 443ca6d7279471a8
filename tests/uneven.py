"""A recipe whose processes find unlike work.

Updates are plain gradient descent with decay: unlike Adam's they are as small as the gradients, so that rounding stays
rounding, and a parameter that got a gradient of zeros instead of none shows by its decay.
"""

import os
import signal
from dataclasses import dataclass, field

import torch
from tones import NextPitch, Tones
from torch import nn

from mmpre.encoder import bert_encoder
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Constant
from mmpre.training.average import Average
from mmpre.view import View


@dataclass(frozen=True)
class Descent:
    lr: float
    schedule: Constant = field(default_factory=Constant)

    def build(self, parameters):
        group = {"params": [p for _, p in parameters], "peak_lr": self.lr}
        return torch.optim.SGD([group], lr=self.lr, momentum=0.9, weight_decay=0.1)


class Signalled(OnePass):
    """Asks for the run's end at a step."""

    stop_at = -1

    def after_step(self, step):
        if step == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


def uneven(
    data: tuple[str, ...] = (),  # shards to train on
    valid: tuple[str, ...] = (),  # held-out shards
    steps: int = 9,  # updates
    batch: int = 4,  # rows in a step
    micro_batches: int = 4,  # parts of a step
    stop_at: int = -1,  # the step after which the run is asked to end
    clip: float = 2.0,  # largest norm
    dropout: float = 0.1,  # everywhere
) -> Recipe:
    """Two tasks with a head each, a tied weight, a frozen layer, an average, and parts of unlike number."""
    net = Network({"tones": Tones(32)}, bert_encoder(32, 2, 2, dropout=dropout))
    view = View(picks={"note": RandomTokens(role="tones", rate=0.3)}, corruption=HideAll())
    heads = [NextPitch(32), NextPitch(32)]
    heads[1].also = net.modalities["tones"].project  # tied, and not used there
    tasks = [Task(f"pitch{i}", view, Signalled(net, [Predict("note", head)])) for i, head in enumerate(heads)]
    for task in tasks:
        task.objective.stop_at = stop_at
    stage = Stage(
        tasks=tasks, data=data, valid=valid, steps=steps, batch=batch, micro_batches=micro_batches, clip=clip,
        max_tokens=12, optimizer=Descent(lr=0.05), valid_every=4, frozen=lambda name: "blocks.0." in name,
    )  # fmt: skip
    return Recipe([stage], net, modules={"unused": nn.Linear(3, 3), "mean": Average(net, 0.7)})
