"""A recipe that breaks where it is told to, and only there.

The environment variable BREAK holds breaks, separated by spaces: `what@step`, `what@step/rank` or `what@*`. What is
done in the trainer happens at the step's forward pass, what is done in a loading worker at the making of its rows.
"""

import os
import random
import signal
import time
from dataclasses import dataclass

import numpy as np
import torch
from tones import NextPitch, ToneReader, Tones
from torch import Tensor, nn

from mmpre.batch import Batch
from mmpre.draw import Draw
from mmpre.encoder import bert_encoder
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.network import Network
from mmpre.objectives.loss import Loss, Term
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe, Stage, Task
from mmpre.runs import checkpoint, leg
from mmpre.schedules import Linear
from mmpre.tokens import Tokens
from mmpre.training.optim import AdamW
from mmpre.view import View

RANK = int(os.environ.get("RANK", 0))


def breaks(what: str, step: int) -> bool:
    """Is this asked for at this step, on this process?"""
    for one in os.environ.get("BREAK", "").split():
        name, _, where = one.partition("@")
        at, _, rank = where.partition("/")
        if name == what and at in ("*", str(step)) and rank in ("", str(RANK)):
            return True
    return False


@dataclass(frozen=True)
class BreakingReader(ToneReader):
    def tokenize(self, sample, draw: Draw) -> Tokens:
        step = draw.step
        if breaks("worker-killed", step):
            os.kill(os.getpid(), signal.SIGKILL)
        if breaks("worker-stopped", step):
            os.kill(os.getpid(), signal.SIGSTOP)
        if breaks("worker-exits", step):
            os._exit(0)
        if breaks("worker-leaves", step):
            raise SystemExit(0)
        if breaks("worker-sleeps", step):
            time.sleep(1e6)
        if breaks("unpicklable", step):

            class LocalError(Exception):
                def __init__(self, one, two):
                    super().__init__(one)

            raise LocalError("cannot be pickled", lambda: None)
        tokens = super().tokenize(sample, draw)
        if breaks("library-noise", step):
            noise = np.random.rand() + random.random() + torch.rand(()).item()
            return Tokens.of_row(
                torch.full((len(tokens["pitch"]),), -1), pitch=tokens["pitch"] + noise, position=tokens["position"]
            )
        return tokens


@dataclass(frozen=True, kw_only=True)
class SometimesNothing(RandomTokens):
    def __call__(self, tokens: Tokens, draw: Draw) -> Tensor:
        index_M = super().__call__(tokens, draw)
        return index_M[:0] if breaks("nothing-picked", draw.step) else index_M


class Breaking(OnePass):
    """Two branches: the notes' pitch, and a second projection of the first state."""

    def __init__(self, net: Network, width: int) -> None:
        super().__init__(net, [Predict("note", NextPitch(width))])
        self.branch = nn.Linear(width, 1)

    def forward(self, batch: Batch, draw: Draw) -> Loss:
        step = draw.step
        if self.training:
            self._break(step)
        elif breaks("slow-held-out", 0):
            time.sleep(0.5)
        loss = super().forward(batch, draw)
        first_BD = self.net(batch).index_select(0, batch.layout.first("tones"))
        branch = self.branch(first_BD).square().sum()
        if self.training and breaks("inf-gradient", step):
            branch = branch * 0 + (self.branch.weight.sum() * 0).sqrt()  # a finite loss of infinite slope
        terms = [*loss.terms, Term("branch", branch, "rows", 0.01)]
        if self.training and breaks("nan", step):
            terms[0] = Term("note", terms[0].sum * float("nan"), terms[0].per)
        if self.training and breaks("spike", step):
            terms[0] = Term("note", terms[0].sum * 100, terms[0].per)
        return Loss(terms, loss.metrics)

    def _break(self, step: int) -> None:
        if breaks("raise", step):
            raise ArithmeticError(f"broken on purpose at step {step}")
        if breaks("killed", step):
            os.kill(os.getpid(), signal.SIGKILL)
        if breaks("stopped", step):
            os.kill(os.getpid(), signal.SIGSTOP)
        if breaks("hangs", step):
            time.sleep(1e6)
        if breaks("slow", step):
            time.sleep(0.1)
        if breaks("other-path", step):
            torch.distributed.all_reduce(torch.zeros(3))


_write = checkpoint._write
_save = checkpoint.save


def _slow_write(path, content):
    time.sleep(1.0 if path.suffix == ".safetensors" else 0.0)
    return _write(path, content)


def _failing_save(folder, step, *words, **more):
    if breaks("save-fails", step):
        raise MemoryError("no memory for this save")
    return _save(folder, step, *words, **more)


def broken(
    data: tuple[str, ...] = (),  # shards to train on
    valid: tuple[str, ...] = (),  # held-out shards
    width: int = 32,  # of the states
    steps: int = 24,  # updates
    batch: int = 16,  # rows in a step
    micro_batches: int = 2,  # parts of a step
    lr: float = 1e-3,  # at its peak
    valid_every: int = 8,  # steps between held-out losses
) -> Recipe:
    if breaks("slow-save", 0):
        checkpoint._write = _slow_write
    leg.checkpoint.save = _failing_save
    if breaks("other-weights", 0):
        torch.manual_seed(RANK)
    if breaks("slow-start", 0):
        time.sleep(2)
    melody = Tones(width)
    melody.reader = BreakingReader()
    net = Network({"tones": melody}, bert_encoder(width, 2, 2, dropout=0.1))
    view = View(picks={"note": SometimesNothing(role="tones", rate=0.3)}, corruption=HideAll())
    stage = Stage(
        tasks=[Task("pitch", view, Breaking(net, width))], data=data, valid=valid, steps=steps, batch=batch,
        micro_batches=micro_batches, valid_every=valid_every,
        optimizer=AdamW(lr=lr, schedule=Linear(warmup=5, total=steps)),
    )  # fmt: skip
    return Recipe([stage], net)
