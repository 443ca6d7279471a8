"""A label for each token: what stands for a part of speech, a name, a gene."""
# n ordinary tokens of one window, C labels

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmpre.data.sample import Sample
from mmpre.evaluation.cards import CardTask
from mmpre.evaluation.fine_tuning import MOST, Example, examples, read, reader_of, train
from mmpre.evaluation.results import NotMeasured, Result, mean, statistic
from mmpre.evaluation.subject import Subject, title
from mmpre.modality import Reader
from mmpre.tokens import Tokens


def token_labels(task: CardTask, subject: Subject) -> list[Result]:
    """Right labels of tokens, of the whole network trained with a linear head on each state, and F1 of all labels but
    the commonest of train.

    A target is a text or a list with a label for each character of the input, or, of a reader that does not tell
    `spans`, for each ordinary token; a token has the label of its first character. Raises NotMeasured where the numbers
    do not fit.
    """
    labels, parts = _parts(task, subject)

    def right(part: str, scores: Sequence[Tensor]) -> list[Tensor]:
        return [s.argmax(1) == one.target for s, one in zip(scores, parts[part], strict=True)]

    best, told = train(
        task, subject, parts, lambda scores: float(torch.cat(right("valid", scores)).float().mean()),
        outputs=len(labels), pool=False,
        loss=lambda score_nC, target_n: F.cross_entropy(score_nC, target_n, ignore_index=-1, reduction="sum")
        / (target_n >= 0).sum().clamp(min=1),
    )  # fmt: skip
    said = [score_nC.argmax(1) for score_nC in read(best, parts["test"])]
    return _told(task, labels, parts, said, told)


def by_pieces(task: CardTask, subject: Subject) -> list[Result]:
    """The same by the label that each piece has most often in train."""
    if not subject.reads(task.input):
        return []
    labels, parts = _parts(task, subject)
    if any("ids" not in one.tokens.fields for some in parts.values() for one in some):
        return []
    counts: dict[int, Counter[int]] = {}
    for one in parts["train"]:
        for piece, label in zip(_ids(one), one.target.tolist(), strict=True):
            counts.setdefault(piece, Counter())[label] += 1
    usual = {piece: count.most_common(1)[0][0] for piece, count in counts.items()}
    said = [torch.tensor([usual.get(piece, _commonest(parts)) for piece in _ids(one)]) for one in parts["test"]]
    return _told(task, labels, parts, said, {"label": "each piece's commonest"})


def _parts(task: CardTask, subject: Subject) -> tuple[list[str], dict[str, list[Example]]]:
    """All labels of train, and the windows of each part with the numbers of their labels, -1 for one not in train."""
    reader = reader_of(task, subject)
    number_of: dict[str, int] = {}

    def target(sample: Sample, windows: Sequence[Tokens], value: Sequence) -> list[Tensor]:
        given = _given(reader, sample, windows, value)
        return [torch.tensor([number_of.setdefault(label, len(number_of)) for label in one]) for one in given]

    parts = {"train": examples(task, subject, "train", target)}
    labels = list(number_of)

    def known(sample: Sample, windows: Sequence[Tokens], value: Sequence) -> list[Tensor]:
        given = _given(reader, sample, windows, value)
        return [torch.tensor([number_of.get(label, -1) for label in one]) for one in given]

    return labels, parts | {part: examples(task, subject, part, known) for part in MOST if part != "train"}


def _given(reader: Reader, sample: Sample, windows: Sequence[Tokens], value: Sequence) -> list[list[str]]:
    """The label of each ordinary token of each window."""
    if not isinstance(value, str | list):
        raise NotMeasured(
            f"sequence labelling: wanted a text or a list of labels, sample {sample.key} has {value!r:.60}; look at "
            "the task's target"
        )
    ordinary = [(one.special_N < 0).tolist() for one in windows]
    if hasattr(reader, "spans"):
        spans = [reader.spans(sample.at_window(i)) for i in range(len(windows))]
        starts = [[a for (a, _), yes in zip(*one, strict=True) if yes] for one in zip(spans, ordinary, strict=True)]
        wanted, of = len(sample.text(reader.suffixes)), "characters"
    else:
        ends = np.cumsum([0, *(sum(one) for one in ordinary)]).tolist()
        starts = [list(range(a, b)) for a, b in pairwise(ends)]
        wanted, of = ends[-1], "tokens"
    if len(value) != wanted:
        raise NotMeasured(
            f"sequence labelling: wanted a label for each of {wanted} {of} of sample {sample.key}, got {len(value)}; "
            f"write one for each of the {of} into the task's target"
        )
    return [[str(value[i]) for i in some] for some in starts]


def _told(task: CardTask, labels: Sequence[str], parts: dict, said: Sequence[Tensor], told: dict) -> list[Result]:
    usual = _commonest(parts)
    targets = [one.target for one in parts["test"]]
    share = [float((a == b).float().mean()) for a, b in zip(said, targets, strict=True)]
    guess = float(np.mean([float((one == usual).float().mean()) for one in targets]))
    both = np.array([int(((a == b) & (b != usual)).sum()) for a, b in zip(said, targets, strict=True)])
    marked = np.array([int((a != usual).sum() + (b != usual).sum()) for a, b in zip(said, targets, strict=True)])
    told = told | {"labels": len(labels), "commonest": labels[usual]}
    return [
        mean(f"{title(task)}: labels of tokens", share, chance=guess, protocol=told),
        statistic(f"{title(task)}: F1 of the rarer labels", _f1, both, marked, chance=0.0, protocol=told),
    ]


def _f1(both_R: np.ndarray, marked_R: np.ndarray) -> float:
    return float(2 * both_R.sum() / max(marked_R.sum(), 1))


def _commonest(parts: dict) -> int:
    return int(torch.cat([one.target for one in parts["train"]]).bincount().argmax())


def _ids(one: Example) -> list[int]:
    return one.tokens["ids"][one.tokens.special_N < 0].tolist()
