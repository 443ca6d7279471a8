"""The melodies of tones.py, with what a report needs to draw them and what was predicted: still one file's work."""

from dataclasses import dataclass

from PIL import Image, ImageDraw
from tones import NextPitch, ToneReader, Tones

from mmpre.encoder import bert_encoder
from mmpre.heads.guess import Restored
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Linear
from mmpre.training.optim import AdamW
from mmpre.view import View


@dataclass(frozen=True)
class ShownReader(ToneReader):
    def show(self, tokens, hidden_N, sample=None):
        picture = Image.new("RGB", (10 * len(tokens), 40), "white")
        for i, (pitch, hidden) in enumerate(zip(tokens["pitch"].tolist(), hidden_N.tolist(), strict=True)):
            y = 20 - 4 * max(-4.0, min(4.0, pitch))
            ImageDraw.Draw(picture).rectangle((10 * i, y, 10 * i + 8, y + 3), fill="red" if hidden else "black")
        return picture


class ShownTones(Tones):
    def __init__(self, width):
        super().__init__(width)
        self.reader = ShownReader()

    def restored(self, tokens, f_NE):
        return tokens.with_values(pitch=f_NE[:, 0])


class ShownPitch(NextPitch):
    def guess(self, state_MD, tokens, index_M):
        return Restored(self.out(state_MD))


def shown_tones(data: tuple[str, ...] = (), valid: tuple[str, ...] = (), width: int = 16, steps: int = 3) -> Recipe:
    net = Network({"tones": ShownTones(width)}, bert_encoder(width, 1, 2))
    view = View(picks={"note": RandomTokens(role="tones", rate=0.3)}, corruption=HideAll())
    task = Task("pitch", view, OnePass(net, [Predict("note", ShownPitch(width))]))
    optimizer = AdamW(lr=1e-3, schedule=Linear(warmup=1, total=steps))
    return Recipe([Stage(tasks=[task], data=data, valid=valid, steps=steps, batch=4, optimizer=optimizer)], net)
