"""A recipe whose front is a frozen model of timm: the place of hidden tokens of a picture, in two stages."""

import timm
from torch import nn

from mmpre.encoder import bert_encoder
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.modalities.timm_images import SquareReader, TimmImages
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Constant
from mmpre.training.optim import AdamW
from mmpre.view import View


class Place(nn.Module):
    """Squared error of a hidden token's place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 1)

    def forward(self, state_MD, tokens, index_M):
        return (self.out(state_MD)[:, 0] - tokens["place"][index_M]).square()

    def measured(self, state_MD, tokens, index_M):
        return self(state_MD, tokens, index_M), {}


def frozen_front(
    data: tuple[str, ...] = (),  # shards of pictures
    width: int = 16,  # of the states
    steps: int = 2,  # of each stage; the first one keeps the table of places as well
) -> Recipe:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, embed_dim=32, depth=1, num_heads=2)
    blocks = bert_encoder(width, 1, 2, dropout=0.0, attention_dropout=0.0)
    net = Network({"image": TimmImages(SquareReader(32, 16), model, width=width, frozen=True)}, blocks)
    view = View(picks={"place": RandomTokens(role="image", rate=0.3)}, corruption=HideAll())
    task = Task("place", view, OnePass(net, [Predict("place", Place(width))]))
    some = dict(data=data, steps=steps, batch=4, optimizer=AdamW(lr=1e-2, weight_decay=0.1, schedule=Constant()))
    return Recipe([Stage(tasks=[task], frozen=lambda n: "places" in n, **some), Stage(tasks=[task], **some)], net)
