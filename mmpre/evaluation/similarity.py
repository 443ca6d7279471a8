"""Do vectors lie as near to each other as people say that what they stand for is?"""
# S pairs, L layers, D width

from collections.abc import Callable, Iterator

import numpy as np
import scipy.sparse
from sklearn.preprocessing import normalize

from mmpre.data.sample import BadMember, Sample
from mmpre.evaluation.bag import bag
from mmpre.evaluation.cards import CardTask, member_of, side
from mmpre.evaluation.features import pooled, towered
from mmpre.evaluation.probe import spearman
from mmpre.evaluation.results import NotMeasured, Result, statistic
from mmpre.evaluation.subject import TEST_ROWS, VALID_ROWS, Subject, title, valid_of

Numbered = Iterator[tuple[int, Sample]]
Read = Callable[[str, Numbered], dict[str, tuple[np.ndarray, object]]]  # a member; numbers and vectors by their name


def similarity(task: CardTask, subject: Subject) -> list[Result]:
    """Spearman's correlation of cosines of two sides' vectors with the pairs' scores.

    Vectors are mean states after each layer, or a tower's; they are taken as they are or less their mean over the
    pairs. Which, is chosen on valid. Raises NotMeasured where the run reads no such member.
    """
    member = member_of(task.input)
    if not subject.reads(member) and not subject.tower(member):
        raise NotMeasured(
            f"similarity: wanted a reader of .{member}, the run reads {', '.join(subject.suffixes)}; measure a run "
            "that reads it, or another task"
        )

    def read(member: str, samples: Numbered) -> dict[str, tuple[np.ndarray, object]]:
        found, samples = {}, list(samples)
        if subject.reads(member):
            vectors = pooled(subject.network, member, samples)
            found |= {f"layer {layer}": (vectors.number_S, x_SD) for layer, x_SD in enumerate(vectors.x_LSD)}
        if named := subject.tower(member):
            vectors = towered(named[1], named[0], member, samples)
            found["tower"] = vectors.number_S, vectors.x_LSD[0]
        return found

    return _compare(task, read)


def by_bags(task: CardTask, subject: Subject) -> list[Result]:
    """The same of bags of pieces."""
    if not subject.reads(member_of(task.input)):
        return []
    return _compare(task, lambda member, samples: {"bag": bag(subject.network, member, samples)})


def pairs(task: CardTask, split: str, most: int) -> Iterator[tuple[int, Sample, tuple[Sample, Sample]]]:
    """Samples and their two sides; those that lack one are left out. Raises NotMeasured for a task without sides."""
    if task.other is None:
        raise NotMeasured(f'{task.kind}: wanted "other", the second side of a pair, beside "input"; add it to the card')
    for number, sample in task.samples(split, most):
        try:
            yield number, sample, (side(sample, task.input), side(sample, task.other))
        except BadMember:
            continue


def _compare(task: CardTask, read: Read) -> list[Result]:
    valid = _cosines(task, valid_of(task), VALID_ROWS, read)
    tried = {way: spearman(cosine_S, score_S) for way, (cosine_S, score_S) in valid.items()}
    way = max(tried, key=lambda one: np.nan_to_num(tried[one], nan=-2.0))
    told = {"vectors": way[0], "centred": way[1], "valid rows": len(valid[way][0])}
    cosine_S, score_S = _cosines(task, task.split, TEST_ROWS, read)[way]
    return [statistic(f"{title(task)}: Spearman", spearman, cosine_S, score_S, chance=0.0, protocol=told)]


def _cosines(task: CardTask, split: str, most: int, read: Read) -> dict[tuple[str, bool], tuple]:
    """By the kind of vectors and whether they are centred: a cosine of each pair, and its score."""
    sides, score = {}, {}
    for number, sample, both in pairs(task, split, most):
        value = task.field(sample, task.target)
        if value is not None:
            score[number] = task.number(sample, value)
            sides[2 * number], sides[2 * number + 1] = both
    if len(score) < 2:
        raise NotMeasured(f"similarity: {split} has fewer than two pairs with {task.target}")
    found = {}
    for name, (number_S, x_SD) in read(member_of(task.input), iter(sides.items())).items():
        row = {number: i for i, number in enumerate(number_S.tolist())}
        whole = [number for number in score if 2 * number in row and 2 * number + 1 in row]
        score_S = np.array([score[number] for number in whole])
        left, right = ([row[2 * number + i] for number in whole] for i in (0, 1))
        for centred in (False,) if scipy.sparse.issparse(x_SD) else (False, True):
            unit_SD = normalize(x_SD - x_SD.mean(0) if centred else x_SD)
            one_SD, other_SD = unit_SD[left], unit_SD[right]
            product_SD = one_SD.multiply(other_SD) if scipy.sparse.issparse(x_SD) else one_SD * other_SD
            found[name, centred] = np.asarray(product_SD.sum(1)).ravel(), score_S
    return found
