"""A recipe whose rows are compared with each other: a melody and its hidden twin among all rows of the step."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from tones import Tones
from torch import Tensor, nn

from mmpre.draw import Draw
from mmpre.encoder import bert_encoder
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.network import Network
from mmpre.objectives.loss import Loss, Term
from mmpre.optim import AdamW, Linear
from mmpre.recipe import Recipe, Stage, Task
from mmpre.tokens import Batch
from mmpre.view import View


class FindTwin(nn.Module):
    """InfoNCE between the first states of a melody with hidden notes and of the whole one; a learned temperature."""

    def __init__(self, net: Network, width: int) -> None:
        super().__init__()
        self.net, self.out = net, nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(2.0))

    @property
    def readers(self):
        return self.net.readers

    def features(self, batch: Batch, draw: Draw) -> dict[str, Tensor]:
        first_B = batch.layout.first("tones")
        hidden_BD = self.out(self.net(batch).index_select(0, first_B))
        whole_BD = self.out(self.net.encode(self.net.embed(batch, clean=True), batch.layout, batch.plan)[first_B])
        return {"hidden": F.normalize(hidden_BD, dim=-1), "whole": F.normalize(whole_BD, dim=-1)}

    def loss(self, features: Mapping[str, Tensor], counts: Sequence[int]) -> Loss:
        scores_BB = features["hidden"] @ features["whole"].mT * self.scale.exp()
        label_B = torch.arange(len(scores_BB))
        loss = F.cross_entropy(scores_BB, label_B, reduction="sum")
        right = (scores_BB.argmax(1) == label_B).sum()
        return Loss([Term("twin", loss, "rows")], {"accuracy": (right, "rows")})


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
    view = View(picks={"note": RandomTokens(role="tones", rate=0.3)}, corruption=HideAll())
    optimizer = AdamW(lr=lr, schedule=Linear(warmup=5, total=steps))
    stage = Stage(
        tasks=[Task("twin", view, FindTwin(net, width))], data=data, valid=valid, steps=steps, batch=batch,
        micro_batches=micro_batches, optimizer=optimizer, valid_every=12,
    )  # fmt: skip
    return Recipe([stage], net)
