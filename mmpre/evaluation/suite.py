"""The tasks of data sets' cards, measured on one network and on what needs none.

What a task is measured by follows from its kind and from what the network has: probes and neighbours from mean states,
retrieval from towers, or from mean states where both sides are read alike.
"""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmpre.data.sample import Sample
from mmpre.evaluation.bag import bag
from mmpre.evaluation.cards import CardTask, as_member, read_card
from mmpre.evaluation.collapse import collapse
from mmpre.evaluation.few_shot import few_shot
from mmpre.evaluation.fine_tuning import MOST, fine_tuned, of_bags
from mmpre.evaluation.minimal_pairs import by_counts, minimal_pairs
from mmpre.evaluation.probe import Known, classify, regress, scaled
from mmpre.evaluation.results import NotMeasured, Result
from mmpre.evaluation.search import search
from mmpre.evaluation.similarity import by_bags, similarity
from mmpre.evaluation.subject import (
    TEST_ROWS,
    TRAIN_ROWS,
    VALID_ROWS,
    Subject,
    known_of,
    title,
    valid_of,
)
from mmpre.evaluation.token_labels import by_pieces, token_labels
from mmpre.evaluation.transcription import transcription
from mmpre.evaluation.zero_shot import zero_shot


def card_tasks(folder: Path) -> list[CardTask]:
    return read_card(folder, tuple(KINDS))


def measure(task: CardTask, subject: Subject) -> list[Result]:
    """A task's results for a network. Raises NotMeasured where it cannot be."""
    way = KINDS[task.kind]
    if way is None:
        raise NotMeasured(f"tasks of kind {task.kind} are not measured here; fine-tune an exported network for them")
    if gone := task.missing():
        raise NotMeasured(gone)
    return way(task, subject)


def trivial(task: CardTask, subject: Subject) -> list[Result]:
    """The same results by what needs no network, such as bags of pieces, for the kinds that have such."""
    way = TRIVIAL.get(task.kind)
    try:
        return [] if way is None or task.missing() else way(task, subject)
    except NotMeasured:
        return []


def _bags(task: CardTask, subject: Subject) -> list[Result]:
    if not subject.reads(task.input):
        return []

    def known(split: str, most: int) -> Known:
        number_S, x_S = bag(subject.network, task.input, task.samples(split, most))
        return known_of(task, split, most, number_S, [x_S])

    return _fit(task, known)


def _probe(task: CardTask, subject: Subject) -> list[Result]:
    if not subject.reads(task.input):
        raise _unread(task)

    def known(split: str, most: int) -> Known:
        vectors = subject.means(task, split, most, task.input)
        return known_of(task, split, most, vectors.number_S, vectors.x_LSD)

    found = _fit(task, known)
    if task.kind == "classification" and subject.tower(task.input) and subject.tower("txt"):
        found += zero_shot(task, subject)
    return found


def _unread(task: CardTask) -> NotMeasured:
    return NotMeasured(f"the run reads no .{task.input}; measure this task on a run with a modality that does")


def _fit(task: CardTask, known: Callable[[str, int], Known]) -> list[Result]:
    most = (TRAIN_ROWS, VALID_ROWS, TEST_ROWS)
    if task.kind == "fine-tuning":  # beside a network that is trained on these samples, and measured on them, alone
        most = tuple(MOST[part] for part in ("train", "valid", "test"))
    parts = [known(*one) for one in zip((task.train, valid_of(task), task.split), most, strict=True)]
    if short := [name for name, one in zip(("train", "valid", "test"), parts, strict=True) if len(one) < 2]:
        raise NotMeasured(f"{' and '.join(short)} have fewer than two samples with {task.target}")
    if task.kind != "regression" and len(labels := set(parts[0].y_S.tolist())) < 2:
        raise NotMeasured(
            f"{task.kind}: wanted samples of two classes in {task.train}, got {', '.join(labels)} alone; look at the "
            "task's target and labels"
        )
    return FITS[task.kind](title(task), *parts)


def _retrieve(task: CardTask, subject: Subject) -> list[Result]:
    """Between the two sides in the space of towers; or like finds like, by mean states."""
    if subject.tower(task.input) and subject.tower(task.target):

        def shared(member: str) -> Placed:
            vectors = subject.in_common(task, task.split, TEST_ROWS, member)
            return vectors.number_S, vectors.x_LSD[0]

        return _search(task, task.split, TEST_ROWS, shared, {})
    if not subject.alike(task.input, task.target):
        raise NotMeasured(
            f"the run has no towers that put .{task.input} and .{task.target} in one space; name them by Recipe.towers"
        )
    if not subject.reads(as_member(task.input)):
        raise _unread(task)
    return _search_means(task, subject)


def _search_means(task: CardTask, subject: Subject) -> list[Result]:
    """Cosines of mean states, each side's scaled by their mean and deviation over train; the layer is chosen by R@1 on
    valid."""

    def results(split: str, most: int, layer: int) -> list[Result]:
        def mean_states(member: str) -> Placed:
            like = subject.means(task, task.train, TRAIN_ROWS, member).x_LSD[layer]
            vectors = subject.means(task, split, most, member)
            x_SD = scaled(vectors.x_LSD[layer], like)
            return vectors.number_S, x_SD / np.linalg.norm(x_SD, axis=1, keepdims=True).clip(1e-9)

        return _search(task, split, most, mean_states, {"layer": layer})

    layers = range(len(subject.means(task, task.split, TEST_ROWS, task.input).x_LSD))
    found = [results(valid_of(task), VALID_ROWS, layer)[0].value for layer in layers]
    return results(task.split, TEST_ROWS, int(np.argmax(found)))


Placed = tuple[np.ndarray, np.ndarray]  # samples' numbers, and a vector of each


def _search(
    task: CardTask, split: str, most: int, of: Callable[[str], Placed], protocol: Mapping[str, Any]
) -> list[Result]:
    """Both ways, or one where both sides are the same member. Members with equal content are one item, and what
    belongs together are samples of one group, or, without groups, of one target."""
    alike = task.input == task.target
    right = _right_answers(task, split, most)
    sides = {}
    for member in dict.fromkeys((task.target, task.input)):
        number_S, x_SD = of(member)
        first = None if alike else _first_of_each(task, split, most, member)
        keep = [row for row, n in enumerate(number_S.tolist()) if n in right and (first is None or n in first)]
        sides[member] = x_SD[keep], [right[number_S[row]] for row in keep]
    results = []
    for query, item in ((task.target, task.input), (task.input, task.target))[alike:]:
        (query_QD, right_Q), (item_PD, right_P) = sides[query], sides[item]
        told = {"pool": len(item_PD) - alike} | dict(protocol)
        name = f"{title(task)}: {query} to {item}"
        results += search(name, query_QD, item_PD, right_Q, right_P, alike=alike, protocol=told)
    return results


def _right_answers(task: CardTask, split: str, most: int) -> dict[int, str]:
    """What a sample's right answers have in common with it."""
    found = {}
    for number, sample in task.sides(split, most, "" if task.group else task.target):
        if task.group:
            value = task.field(sample, task.group)
        else:
            content = _content(sample, as_member(task.target))
            value = None if content is None else hashlib.sha1(content).hexdigest()
        if value is not None:
            found[number] = str(value)
    return found


def _first_of_each(task: CardTask, split: str, most: int, member: str) -> set[int]:
    """The number of the first sample with each content of a member."""
    found: dict[bytes, int] = {}
    for number, sample in task.sides(split, most, member):
        if (content := _content(sample, as_member(member))) is not None:
            found.setdefault(content, number)
    return set(found.values())


def _content(sample: Sample, member: str) -> bytes | None:
    """Of a member, or of the first that a sample has of several ("ogg|wav")."""
    return next((sample.members[one].strip() for one in member.split("|") if one in sample.members), None)


def spread_of(task: CardTask, subject: Subject) -> list[Result]:
    """Measures of collapse on the samples that a task reads."""
    if task.missing() or not subject.reads(task.input):
        return []
    member = task.input.replace("|", " or ")
    return collapse(f"{task.set} {member}", subject.means(task, task.split, TEST_ROWS, task.input).x_LSD[-1])


FITS = {"classification": classify, "regression": regress, "few-shot": few_shot, "fine-tuning": of_bags}
TRIVIAL: dict[str, Callable[[CardTask, Subject], list[Result]]] = dict.fromkeys(FITS, _bags) | {
    "similarity": by_bags, "minimal pairs": by_counts, "sequence labelling": by_pieces,
}  # fmt: skip
KINDS: dict[str, Callable[[CardTask, Subject], list[Result]] | None] = {
    "classification": _probe, "regression": _probe, "few-shot": _probe, "zero-shot": zero_shot,
    "similarity": similarity, "minimal pairs": minimal_pairs, "fine-tuning": fine_tuned,
    "sequence labelling": token_labels, "transcription": transcription,
    "retrieval": _retrieve, "detection": None, "link prediction": None,
}  # fmt: skip
