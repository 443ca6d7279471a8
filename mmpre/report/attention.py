"""Who reads whom: the attention of every layer on one clean row, as arrays, and over the row itself."""
# H heads, n tokens that read m

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from mmpre.attention.backends import watched
from mmpre.network import Network
from mmpre.report.drawing import Drawn, boxes, heat, in_little
from mmpre.report.opened import Opened, Shown
from mmpre.view import View

MOST_TOKENS = 1024  # of a row whose attention is looked at
MOST_PLACED = 400  # of a role whose tokens are looked for in its picture
LAYERS = 4  # that are laid over the row
HEADS = 16  # of a layer that are drawn
TRIED = 16  # rows, of which the first that is short enough is taken
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Layer:
    """Pictures of a layer's weights: the mean of its heads, and each head."""

    name: str
    mean: str
    heads: Sequence[str]
    size: tuple[int, int]


@dataclass(frozen=True)
class Over:
    """A role of the row with how much each of its tokens is read; in a picture, at its box.

    Shares are told between the lowest (0) and the highest (1) of its ordinary tokens, which are `low` and `high`.
    """

    drawn: Drawn
    words: Sequence[float] = ()
    placed: Sequence[tuple[Box, float]] = ()
    low: float = 0.0
    high: float = 0.0


@dataclass(frozen=True)
class Attention:
    title: str
    about: str
    key: str
    layers: Sequence[Layer]
    over: Sequence[tuple[str, Sequence[Over]]]
    template: str = "attention.html"

    @property
    def broad(self) -> bool:
        return any(one.drawn.broad for _, roles in self.over for one in roles)

    @property
    def wordy(self) -> bool:
        """Whether there is more text than fits beside pictures."""
        return any(len(one.words) > 30 for _, roles in self.over for one in roles)


def panels(opened: Opened) -> Iterator[Attention]:
    """One panel, of the recipe's network where it is one that reads whole rows."""
    network = opened.network
    if network is None:
        return
    rows = opened.rows(View(), network.readers, TRIED)
    shown = next((one for one in rows if one.row.length <= MOST_TOKENS), None)
    if shown is not None:
        weights = weights_of(opened, network, shown)
        own = [one for one in weights if one.shape[1:] == (shown.row.length,) * 2]
        every = range(len(own))
        some = sorted({round(x) for x in np.linspace(0, len(own) - 1, min(LAYERS, len(own)))}) if own else []
        over = list(zip([f"layer {i + 1}" for i in some], _over(network, shown, [own[i] for i in some]), strict=True))
        about = (
            "of one row with nothing hidden. Over the row: how much each token is read, over all heads and readers, "
            "from the least to the most. Arrays: each line reads the columns"
        )
        yield Attention("attention", about, shown.row.key, [_layer(i, own[i]) for i in every], over)


@torch.no_grad()
def weights_of(opened: Opened, network: Network, shown: Shown) -> list[Float[np.ndarray, "H n m"]]:
    """The attention weights of each call on one row, the lowest layer first."""
    with watched() as calls:
        network(opened.batch([shown.row], View(attend=network.attend)))
    return [rows[0].float().cpu().numpy() for rows in calls if len(rows) == 1]


def _layer(number: int, weight_Hnm: Float[np.ndarray, "H n m"]) -> Layer:
    heads = [heat(one_nm, most_px=64) for one_nm in weight_Hnm[:HEADS]]
    return Layer(f"layer {number + 1}", heat(weight_Hnm.mean(0)), heads, weight_Hnm.shape[1:])


def _over(network: Network, shown: Shown, layers: Sequence[Float[np.ndarray, "H n n"]]) -> Iterator[list[Over]]:
    """For each layer, the roles of the row and how much each token is read."""
    roles, start = [], 0
    for role, tokens in shown.row.clean.items():
        reader = network.readers[role]
        drawn, kept = in_little(reader, role, tokens, shown.sample)
        places = boxes(reader, tokens, shown.sample) if drawn.picture and len(tokens) <= MOST_PLACED else []
        roles.append((slice(start, start + len(tokens)), tokens.special_N >= 0, drawn, kept, places))
        start += len(tokens)
    for weight_Hnn in layers:
        made = []
        for part, special_n, drawn, kept, places in roles:
            read_n = weight_Hnn.mean((0, 1))[part]
            ordinary = read_n[~special_n.numpy()]
            low, high = (float(f(ordinary)) for f in (np.min, np.max)) if len(ordinary) else (0.0, 1.0)
            share_n = np.clip((read_n - low) / max(high - low, 1e-9), 0, 1)  # special tokens often drown the rest
            placed = [(box, round(float(s), 3)) for box, s in zip(places, share_n, strict=False) if box]
            words = [round(float(share_n[i]), 3) for i in kept] if drawn.pieces else []
            made.append(Over(drawn, words, placed, low, high))
        yield made
