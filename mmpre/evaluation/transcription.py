"""What is said, character by character: connectionist temporal classification, and its error rate."""
# n tokens of one window, C characters and the blank, T characters of one text

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mmpre.data.sample import Sample
from mmpre.evaluation.cards import CardTask
from mmpre.evaluation.fine_tuning import MOST, examples, labelled, read, reader_of, train
from mmpre.evaluation.results import Result, statistic
from mmpre.evaluation.subject import Subject, title
from mmpre.tokens import Tokens

BLANK = 0


def transcription(task: CardTask, subject: Subject) -> list[Result]:
    """The character error rate of the whole network, trained with CTC (Graves et al. 2006) on its states.

    The likeliest character of each token is taken, without a language model; texts are in lower case, with single
    spaces. Windows of a recording are read one after the other; training takes recordings of a single window that have
    room for their text. An empty answer has a rate of 1.
    """
    reader_of(task, subject)
    texts = {part: {n: _plain(v) for n, _, v in labelled(task, part)} for part in MOST}
    letters = sorted(set("".join(texts["train"].values())))
    number_of = {letter: i + 1 for i, letter in enumerate(letters)}

    def target(sample: Sample, windows: Sequence[Tokens], value: str) -> list[Tensor]:
        said = torch.tensor([number_of.get(letter, BLANK) for letter in _plain(value)])
        return [said] * len(windows) if len(said) else []

    def fitting(sample: Sample, windows: Sequence[Tokens], value: str) -> list[Tensor]:
        made = target(sample, windows, value)
        room = len(made) == 1 and _needed(made[0]) <= int((windows[0].special_N < 0).sum())
        return made if room else []

    parts = {part: examples(task, subject, part, fitting if part == "train" else target, whole=True) for part in MOST}

    def edits(part: str, scores: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
        said: dict[int, str] = {}
        for example, score_nC in zip(parts[part], scores, strict=True):
            said[example.number] = said.get(example.number, "") + _decoded(score_nC, letters)
        return _edits([said[n] for n in sorted(said)], [texts[part][n] for n in sorted(said)])

    best, told = train(
        task, subject, parts, lambda scores: -_rate(*edits("valid", scores)), outputs=len(letters) + 1, pool=False,
        loss=_ctc,
    )  # fmt: skip
    found = edits("test", read(best, parts["test"]))
    told |= {"letters": len(letters), "reading": "greedy, lower case, single spaces"}
    name = f"{title(task)}: character error rate"
    return [statistic(name, _rate, *found, chance=1.0, less=True, protocol=told)]


def _ctc(score_nC: Float[Tensor, "n C"], target_T: Int[Tensor, "T"]) -> Float[Tensor, ""]:
    """Nats a character."""
    sizes = torch.tensor([len(score_nC)]), torch.tensor([len(target_T)])
    return F.ctc_loss(F.log_softmax(score_nC, 1)[:, None], target_T[None], *sizes, blank=BLANK)


def _needed(target_T: Int[Tensor, "T"]) -> int:
    """The fewest tokens that a text can be said with: equal neighbours need a blank between them."""
    return len(target_T) + int((target_T[1:] == target_T[:-1]).sum())


def _decoded(score_nC: Float[Tensor, "n C"], letters: Sequence[str]) -> str:
    said = torch.unique_consecutive(score_nC.argmax(1)).tolist()
    return "".join(letters[i - 1] for i in said if i != BLANK)


def _edits(said: Sequence[str], wanted: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """How many characters of each answer are to be put in, taken out or changed, and how many were wanted."""
    from torchmetrics.functional.text import char_error_rate  # takes seconds, which only this measure should cost

    length_S = np.array([len(one) for one in wanted])
    rates = [float(char_error_rate([one], [other])) for one, other in zip(said, wanted, strict=True)]
    return np.round(np.array(rates) * length_S), length_S


def _rate(edit_S: np.ndarray, length_S: np.ndarray) -> float:
    return float(edit_S.sum() / length_S.sum())


def _plain(text: object) -> str:
    return " ".join(str(text).split()).casefold()
