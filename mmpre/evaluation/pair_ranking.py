"""Do pairs of tokens that belong together score above those that do not?"""
# P questions on pairs of tokens, R rows

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.stats import rankdata
from torch import Tensor

from mmpre.batch import Row, pack
from mmpre.data.units import Units
from mmpre.evaluation.results import NotMeasured, Result, statistic
from mmpre.evaluation.rows import made_rows
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.processes.processes import Processes
from mmpre.tokens import Tokens
from mmpre.view import View

CHUNK = 64  # rows encoded at a time


@dataclass(frozen=True)
class PairRanking:
    """The area under the ROC curve (AUC) of a readout's scores, over the questions of the first `rows` units.

    The view makes questions (`AskPairs`) and picks both ends (`Asked`) for the readout, whose head is `PairScores`. A
    `rule`, by its name, tells by a row's tokens alone how likely pairs are, and is measured on the same questions.
    Intervals are over rows; rows without questions do not count.
    """

    objective: OnePass
    readout: Predict
    view: View
    rule: tuple[str, Callable[[Tokens, Int[Tensor, "P 2"]], Float[Tensor, "P"]]] | None = None
    rows: int = 500
    name: str = "asked pairs"

    @torch.no_grad()
    def run(self, units: Units, processes: Processes) -> Sequence[Result]:
        rows = made_rows(self.view, self.objective.readers, units, self.rows)
        answers = (one for some in _chunks(row for row, _ in rows) for one in self.answers(some, processes))
        asked = [one for one in answers if len(one[0])]
        if not asked:
            raise NotMeasured(f"{self.name}: no row has a pair of tokens to ask about")
        truth_R, score_R, by_rule_R = zip(*asked, strict=True)
        told = {"pairs": sum(map(len, truth_R)), "true": int(sum(one.sum() for one in truth_R))}
        kinds = {self.name: score_R} | ({f"{self.name}, {self.rule[0]}": by_rule_R} if self.rule else {})
        return [_over_rows(f"{name}: AUC", truth_R, given_R, told) for name, given_R in kinds.items()]

    def answers(self, rows: Sequence[Row], processes: Processes) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Of each row's questions whether the pair was there, its score, and the rule's."""
        batch = pack(rows, self.view.attend.plan).to(processes.device)
        tokens, head = batch.clean[batch.picked[self.readout.pick].role], self.readout.head
        score_P = head.scores(self.objective.states(self.readout, batch)).float().cpu()
        asked, true = (tokens.fields[f"{head.field}_{what}"] for what in ("asked", "true"))
        by_rule_P = self.rule[1](tokens.to("cpu"), asked.values.cpu()) if self.rule else torch.zeros(len(score_P))
        parts = (one.split(true.lengths_B.tolist()) for one in (true.values.cpu(), score_P, by_rule_P))
        for some in zip(*parts, strict=True):
            yield tuple(one.numpy() for one in some)


def auc(truth_P: np.ndarray, score_P: np.ndarray) -> float:
    """The chance that a true pair scores higher than another, equal scores counting half; NaN without both kinds."""
    true_P = truth_P > 0
    true, false = int(true_P.sum()), int((~true_P).sum())
    if not true or not false:
        return float("nan")
    return float((rankdata(score_P)[true_P].sum() - true * (true + 1) / 2) / (true * false))


def _over_rows(name: str, truth_R: Sequence[np.ndarray], score_R: Sequence[np.ndarray], told: dict) -> Result:
    def measure(row_R: np.ndarray) -> float:
        return auc(*(np.concatenate([one[row] for row in row_R.tolist()]) for one in (truth_R, score_R)))

    return statistic(name, measure, np.arange(len(truth_R)), chance=0.5, protocol=told)


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while some := list(islice(rows, CHUNK)):
        yield some
