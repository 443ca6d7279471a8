"""A recipe of two stages, with an averaged teacher in both: rows grow in number, then optimizer, schedule and data go
on with a new head on a network whose first layer rests."""

from tones import NextPitch, Tones
from torch import nn

from mmpre.encoder import bert_encoder
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.network import Network
from mmpre.objectives.loss import Loss, Term
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.runs.starts import Carry
from mmpre.schedules import BatchRamp, Linear, LinearRamp
from mmpre.training.average import Average
from mmpre.training.optim import AdamW
from mmpre.view import View


class Follow(nn.Module):
    """What a OnePass learns, and to give the states that an average of its network gives."""

    def __init__(self, plain: OnePass, teacher: Average) -> None:
        super().__init__()
        self.plain, self.teacher = plain, teacher
        self.readers = plain.readers

    def forward(self, batch, draw):
        loss = self.plain(batch, draw)
        far = (self.plain.net(batch) - self.teacher(batch)).square().mean(1).sum()
        return Loss([*loss.terms, Term("follow", far, "tokens", 0.1)], loss.metrics)


def two_stages(
    data: tuple[str, ...] = (),  # shards to train on
    valid: tuple[str, ...] = (),  # held-out shards
    width: int = 32,  # of the states
    steps: int = 60,  # updates in both stages
    batch: int = 16,  # rows in a step of the first stage; the second takes twice as many
    micro_batches: int = 4,  # parts of a step
    lr: float = 1e-3,  # at its peak
) -> Recipe:
    net = Network({"tones": Tones(width)}, bert_encoder(width, 2, 2, dropout=0.1))
    teacher = Average(net, LinearRamp(first=0.8, last=0.99, steps=steps))
    first, second = steps // 2, steps - steps // 2

    def stage(rate: float, number: int, **more: object) -> Stage:
        view = View(picks={"note": RandomTokens(role="tones", rate=rate)}, corruption=HideAll())
        task = Task("pitch", view, Follow(OnePass(net, [Predict("note", NextPitch(width))]), teacher))
        return Stage(
            tasks=[task], data=data, valid=valid, batch=batch * number, micro_batches=micro_batches,
            optimizer=AdamW(lr=lr, schedule=Linear(warmup=5, total=steps, floor=0.2)), valid_every=8, **more,
        )  # fmt: skip

    return Recipe(
        [
            stage(0.3, 1, steps=first, ramp=BatchRamp(first=micro_batches, steps=first - 4)),
            stage(
                0.5, 2, steps=second, max_tokens=40, carry=Carry(optimizer=True, schedule=True, data=True),
                frozen=lambda name: "blocks.0." in name,
            ),
        ],
        net,
    )  # fmt: skip
