"""Retrieval examples: by evaluations that score pairs, and by objectives that compare vectors of two views."""
# P samples among which is retrieved, D width of the vectors

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float

from mmpre.batch import Row, Views
from mmpre.data.sample import BadMember, Sample
from mmpre.data.shards import CorruptSample
from mmpre.draw import Draw
from mmpre.modality import Reader
from mmpre.objectives.contrast import Contrast
from mmpre.recipe import Task
from mmpre.report.drawing import Drawn, in_little
from mmpre.report.opened import Opened, Shown
from mmpre.view import View

QUERIES, BEST = 4, 4
POOL, VECTORS = 32, 200  # samples that pairs are scored of, and that have vectors


@runtime_checkable
class Scores(Protocol):
    """An evaluation that scores pairs of two roles of samples: `PairRetrieval`."""

    query: str
    item: str
    readers: Mapping[str, Reader]

    def scores(self, samples: Sequence[Sample], processes: Any) -> Float[torch.Tensor, "P P"]: ...


@dataclass(frozen=True)
class Found:
    """What was asked for, and what came, best first: each a row, a number, and whether it is the right one."""

    query: Sequence[Drawn]
    results: Sequence[tuple[Sequence[Drawn], float, bool]]


@dataclass(frozen=True)
class Retrieved:
    title: str
    about: str
    found: Sequence[Found]
    template: str = "retrieved.html"


def of_evaluations(opened: Opened) -> Iterator[Retrieved]:
    """By evaluations that score pairs."""
    for one in opened.recipe.evaluations:
        if isinstance(one, Scores):
            yield _by_pairs(opened, one)


def of_tasks(opened: Opened) -> Iterator[Retrieved]:
    """By tasks that compare vectors of two views."""
    for task in opened.tasks:
        if isinstance(task.objective, Contrast) and isinstance(task.view, Mapping):
            yield from _by_vectors(opened, task)


def drawings(readers: Mapping[str, Reader], shown: Shown, role: str | None = None) -> list[Drawn]:
    """The roles of a row, or one of them, nothing hidden."""
    return [
        in_little(readers[name], name, tokens, shown.sample)[0]
        for name, tokens in shown.row.clean.items()
        if role in (None, name)
    ]


def _by_pairs(opened: Opened, evaluation: Scores) -> Retrieved:
    samples = [sample for _, sample in opened.samples(POOL)]
    score_PP = evaluation.scores(samples, opened.processes).numpy()
    rows = [_made(View(), evaluation.readers, sample, 0) for sample in samples]
    sides = [
        [(lambda shown=one, role=role: drawings(evaluation.readers, shown, role)) for one in rows]
        for role in (evaluation.query, evaluation.item)
    ]
    return _told(evaluation.query, evaluation.item, score_PP, *sides)


@torch.no_grad()
def _by_vectors(opened: Opened, task: Task) -> Iterator[Retrieved]:
    """Each row of the first view among those of the second, where the views have different roles."""
    views: Mapping[str, View] = task.held_out or task.view
    first, second = task.objective.towers
    readers = task.objective.readers
    pairs = []
    for unit, sample in opened.samples(VECTORS):
        try:
            pairs.append({name: _made(views[name], readers, sample, unit) for name in (first, second)})
        except (BadMember, CorruptSample):
            continue
    if not pairs or pairs[0][first].row.clean.keys() == pairs[0][second].row.clean.keys():
        return
    batches = {name: opened.batch([pair[name].row for pair in pairs], views[name]) for name in (first, second)}
    vectors = task.objective.features(Views(batches), Draw.micro_batch(0, 0, 0, 0))
    score_PP = (vectors[first] @ vectors[second].mT).float().cpu().numpy()
    sides = [
        [(lambda shown=pair[name], own=readers | views[name].readers: drawings(own, shown)) for pair in pairs]
        for name in (first, second)
    ]
    yield _told(first, second, score_PP, *sides)


def _told(query: str, item: str, score_PP: Float[np.ndarray, "P P"], asked: Sequence, items: Sequence) -> Retrieved:
    """Draw some queries and the best items of each; `asked` and `items` draw their rows when they are called."""
    found = []
    for q in np.linspace(0, len(score_PP) - 1, min(QUERIES, len(score_PP))).round().astype(int).tolist():
        best = np.argsort(-score_PP[q])[:BEST].tolist()
        found.append(Found(asked[q](), [(items[i](), float(score_PP[q, i]), i == q) for i in best]))
    about = f"the {BEST} best of {len(score_PP)}; marked: the right one"
    return Retrieved(f"retrieval, {query} to {item}", about, found)


def _made(view: View, readers: Mapping[str, Reader], sample: Sample, unit: int) -> Shown:
    made = Draw.row(0, 0, 0, epoch=0, unit=unit)
    row: Row = view.row(sample, readers, made, lambda role, k: sample)
    return Shown(sample, row, made)
