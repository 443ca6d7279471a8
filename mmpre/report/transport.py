"""Words over a picture: where the mass of each word goes among regions, by the plan that an objective learns from."""
# N tokens of the packed batch, x tokens of the first role, y of the second, D model width

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mmpre.layout import Layout
from mmpre.objectives.one_pass import OnePass
from mmpre.report.drawing import Drawn, boxes, draw, letters
from mmpre.report.opened import Opened, Shown
from mmpre.show import Says
from mmpre.view import View

ROWS = 2
MOST = 64  # tokens of the second role
Box = tuple[int, int, int, int]


@runtime_checkable
class Plans(Protocol):
    """A readout that lays the tokens of two roles over each other: `Align`."""

    roles: tuple[str, str]

    def plan(self, state_ND: Float[Tensor, "N D"], layout: Layout, row: int) -> Float[Tensor, "x y"]: ...


@dataclass(frozen=True)
class Moved:
    """A row: its words with the shares of each that go to the places of the other role, and the picture of these."""

    key: str
    words: Sequence[tuple[str, Sequence[float]]]
    drawn: Drawn
    placed: Sequence[Box | None]


@dataclass(frozen=True)
class Transport:
    title: str
    about: str
    rows: Sequence[Moved]
    template: str = "transport.html"


def panels(opened: Opened) -> Iterator[Transport]:
    """A panel for each readout that has a plan between words and what can be drawn."""
    for task in opened.tasks:
        objective = task.objective
        for readout in objective.readouts if isinstance(objective, OnePass) else ():
            if isinstance(readout, Plans) and isinstance(objective.readers[readout.roles[0]], Says):
                rows = opened.rows(View(), objective.readers, ROWS)
                found = [_moved(opened, objective, readout, one) for one in rows]
                first, second = readout.roles
                about = f"Where each token of {first} goes in {second}. Point at a word, or tap it, to see its shares."
                yield Transport(f"{first} over {second}", about, [one for one in found if one is not None])


@torch.no_grad()
def _moved(opened: Opened, objective: OnePass, readout: Plans, shown: Shown) -> Moved | None:
    batch = opened.batch([shown.row])
    first, second = (shown.row.clean[role] for role in readout.roles)
    reader, other = (objective.readers[role] for role in readout.roles)
    if len(second) > MOST:
        return None
    plan_xy = readout.plan(objective.states(readout, batch), batch.layout, 0).float().cpu()
    share_xy = plan_xy / plan_xy.sum(1, keepdim=True).clamp(min=1e-12)
    words = [
        (letters(text), [round(float(s), 3) for s in share_y])
        for text, kind, share_y in zip(reader.texts(first), first.special_N.tolist(), share_xy, strict=True)
        if kind < 0
    ]
    nothing_y = torch.zeros(len(second), dtype=torch.bool)
    drawn = draw(other, readout.roles[1], second, nothing_y, shown.sample)
    return Moved(shown.row.key, words, drawn, boxes(other, second, shown.sample) if drawn.picture else [])
