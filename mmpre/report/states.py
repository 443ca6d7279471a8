"""Which rows lie near each other: a map of their mean states, and the neighbours of some."""
# R rows, D model width

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from mmpre.batch import Row
from mmpre.data.sample import Sample
from mmpre.evaluation.cards import CardError, CardTask
from mmpre.evaluation.suite import card_tasks
from mmpre.network import Network
from mmpre.report.opened import Opened, Shown
from mmpre.report.retrieval import BEST, QUERIES, Found, Retrieved, drawings
from mmpre.view import View

log = logging.getLogger(__name__)
LONGEST_LABEL = 60  # letters; longer ones are texts
ROWS, CHUNK = 300, 16  # on the map, and encoded at a time
NAMED = 7  # labels with a colour of their own; the others share one
SPREAD = 40  # rows from which on t-SNE is drawn; few rows are drawn by their principal components
SIDE = 340  # of the map


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    colour: int
    text: str


@dataclass(frozen=True)
class Map:
    """Rows in two dimensions, with the colours of a label."""

    title: str
    dots: Sequence[Dot]
    names: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Maps:
    title: str
    about: str
    maps: Sequence[Map]
    side: int = SIDE
    template: str = "map.html"


def panels(opened: Opened) -> Iterator[Maps | Retrieved]:
    """Rows of the network on a map, and the neighbours of some."""
    network = opened.network
    if network is not None:
        shown = list(opened.rows(View(), network.readers, ROWS))
        if len(shown) > QUERIES:
            state_RD = states(opened, network, [one.row for one in shown])
            yield maps(opened, shown, state_RD)
            yield _nearest(network, shown, state_RD)


@torch.no_grad()
def states(opened: Opened, network: Network, rows: Sequence[Row]) -> Float[np.ndarray, "R D"]:
    """The mean state of each row's tokens, special ones included."""
    state_RD = []
    for start in range(0, len(rows), CHUNK):
        batch = opened.batch(rows[start : start + CHUNK], View(attend=network.attend))
        state_ND, lengths = network(batch).float(), batch.layout.lengths_B.tolist()
        mean_BD = torch.stack([state_nD.mean(0) for state_nD in state_ND.split(lengths)])
        state_RD.append(batch.given(mean_BD).cpu())
    return torch.cat(state_RD).numpy()


def maps(opened: Opened, shown: Sequence[Shown], state_RD: Float[np.ndarray, "R D"]) -> Maps:
    """The rows in two dimensions, once for each label that the data's card names, or without colours."""
    place_R2, how = flat(state_RD)
    low_2, high_2 = place_R2.min(0), place_R2.max(0)
    place_R2 = 10 + (place_R2 - low_2) / np.maximum(high_2 - low_2, 1e-9) * (SIDE - 20)
    named = labels(_card_tasks(opened.card_folder), [one.sample for one in shown])
    about = f"{len(shown)} rows by the mean of their states; {how}"
    made = []
    for title, label_R in named or [("", [""] * len(shown))]:
        common = [name for name, _ in Counter(label_R).most_common(NAMED)] if title else []
        dots = [
            Dot(round(float(x), 1), round(float(y), 1), common.index(label) if label in common else 7 if title else 0,
                f"{one.row.key} {label}".strip())
            for (x, y), label, one in zip(place_R2, label_R, shown, strict=True)
        ]  # fmt: skip
        names = [(name, i) for i, name in enumerate(common)]
        names += [("others", 7)] if title and len(set(label_R)) > NAMED else []
        made.append(Map(f"map of rows, by {title}" if title else "map of rows", dots, names))
    return Maps("map of rows", about, made)


def flat(state_RD: Float[np.ndarray, "R D"]) -> tuple[Float[np.ndarray, "R 2"], str]:
    """Two dimensions of many, and how they were made."""
    whole = PCA(min(50, *state_RD.shape), random_state=0).fit(state_RD)
    main_RC = whole.transform(state_RD)
    if len(state_RD) < SPREAD:
        share = float(whole.explained_variance_ratio_[:2].sum())
        return main_RC[:, :2], f"two principal components, {share:.0%} of the variance"
    near = min(30.0, (len(state_RD) - 1) / 4)
    return TSNE(2, perplexity=near, init="pca", random_state=0).fit_transform(main_RC), f"t-SNE, perplexity {near:.0f}"


def labels(tasks: Sequence[CardTask], samples: Sequence[Sample]) -> list[tuple[str, list[str]]]:
    """The labels that a card's classification tasks name, one for each sample; at most two that tell rows apart."""
    found = []
    for task in tasks:
        if task.kind == "classification":
            told = [_label(task, sample) for sample in samples]
            if 1 < len(set(told)) <= len(samples) / 2:
                found.append((task.about, told))
    return found[:2]


def _label(task: CardTask, sample: Sample) -> str:
    """What a sample is, by name where the card has names; "" where it does not say, or says more than a label."""
    value = task.field(sample, task.target)
    text = "" if value is None else str(value)
    if text.isdecimal() and int(text) < len(task.names):
        return task.names[int(text)]
    return text if len(text) <= LONGEST_LABEL else ""


def _card_tasks(folder: Path | None) -> list[CardTask]:
    if folder is None:
        return []
    try:
        return card_tasks(folder)
    except CardError as e:
        log.warning("%s; the map of rows has no colours", e)
        return []


def _nearest(network: Network, shown: Sequence[Shown], state_RD: Float[np.ndarray, "R D"]) -> Retrieved:
    centred_RD = state_RD - state_RD.mean(0)
    unit_RD = centred_RD / np.maximum(np.linalg.norm(centred_RD, axis=1, keepdims=True), 1e-9)
    found = []
    for query in np.linspace(0, len(shown) - 1, QUERIES + 2).round().astype(int).tolist()[1:-1]:
        cosine_R = unit_RD @ unit_RD[query]
        cosine_R[query] = -np.inf
        best = np.argsort(-cosine_R)[:BEST].tolist()
        results = [(drawings(network.readers, shown[i]), float(cosine_R[i]), False) for i in best]
        found.append(Found(drawings(network.readers, shown[query]), results))
    about = f"of {len(shown)} rows, by the cosine of their mean states less the mean of all"
    return Retrieved("nearest rows", about, found)
