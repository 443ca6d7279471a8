"""A modality and a recipe that mmpre knows nothing of, in one file: short melodies, one number a note (`.notes`)."""

from dataclasses import dataclass

import torch
from torch import nn

from mmpre.data.sample import BadMember, Sample
from mmpre.draw import Draw
from mmpre.encoder import bert_encoder
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Linear
from mmpre.tokens import Tokens
from mmpre.training.optim import AdamW
from mmpre.view import View


@dataclass(frozen=True)
class ToneReader:
    suffixes: tuple[str, ...] = ("notes",)

    def tokenize(self, sample: Sample, draw: Draw) -> Tokens:
        text = sample.text(self.suffixes)
        try:
            pitch_N = torch.tensor([float(note) for note in text.split()])
        except ValueError as e:
            raise BadMember("not notes", "notes", str(e)) from None
        return Tokens.of_row(torch.full((len(pitch_N),), -1), pitch=pitch_N, position=torch.arange(len(pitch_N)))


class Tones(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.reader = ToneReader()
        self.project = nn.Linear(1, width)
        self.position = nn.Embedding(64, width)
        self.mask_D = nn.Parameter(torch.zeros(width))

    def features(self, tokens):
        return tokens["pitch"][:, None]

    def embed(self, f_NE, tokens, replaced_N):
        x_ND = torch.where(replaced_N[:, None], self.mask_D, self.project(f_NE))
        return x_ND + self.position(tokens["position"])


class NextPitch(nn.Module):
    """Squared error of a hidden note's pitch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, 1)

    def forward(self, state_MD, tokens, index_M):
        return (self.out(state_MD)[:, 0] - tokens["pitch"][index_M]).square()

    def measured(self, state_MD, tokens, index_M):
        return self(state_MD, tokens, index_M), {}


def tones(
    data: tuple[str, ...] = (),  # shards to train on
    valid: tuple[str, ...] = (),  # held-out shards
    width: int = 32,  # of the states
    depth: int = 2,  # layers
    steps: int = 60,  # updates
    batch: int = 16,  # rows in a step
    micro_batches: int = 4,  # parts of a step
    lr: float = 3e-3,  # at its peak
    dropout: float = 0.1,  # everywhere
) -> Recipe:
    melody = Tones(width)
    net = Network({"tones": melody}, bert_encoder(width, depth, 2, dropout=dropout))
    view = View(picks={"note": RandomTokens(role="tones", rate=0.3)}, corruption=HideAll())
    task = Task("pitch", view, OnePass(net, [Predict("note", NextPitch(width))]))
    stage = Stage(
        tasks=[task], data=data, valid=valid, steps=steps, batch=batch, micro_batches=micro_batches, valid_every=20,
        optimizer=AdamW(lr=lr, schedule=Linear(warmup=5, total=steps)),
    )  # fmt: skip
    return Recipe([stage], net)
