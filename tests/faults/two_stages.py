"""A recipe of two stages: all weights first, then a new head on a network whose first layer rests, on longer steps."""

from tones import NextPitch, Tones

from mmpre.encoder import bert_encoder
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.optim import AdamW, Constant, Linear
from mmpre.recipe import Recipe, Stage, Task
from mmpre.view import View


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
    first, second = steps // 2, steps - steps // 2

    def stage(rate: float, number: int, **more: object) -> Stage:
        view = View(picks={"note": RandomTokens(role="tones", rate=rate)}, corruption=HideAll())
        task = Task("pitch", view, OnePass(net, [Predict("note", NextPitch(width))]))
        return Stage(
            tasks=[task], data=data, valid=valid, batch=batch * number, micro_batches=micro_batches,
            valid_every=8, **more,
        )  # fmt: skip

    return Recipe(
        [
            stage(0.3, 1, steps=first, optimizer=AdamW(lr=lr, schedule=Linear(warmup=5, total=first))),
            stage(
                0.5, 2, steps=second, optimizer=AdamW(lr=lr, schedule=Constant()), max_tokens=40,
                frozen=lambda name: "blocks.0." in name,
            ),
        ],
        net,
    )  # fmt: skip
