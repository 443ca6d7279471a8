"""Does a network that predicts hidden tokens find the right one of two sentences likelier?"""
# N tokens of one sentence, n ordinary ones of a batch's rows, V ids

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import isclose

import numpy as np
import torch
from torch import nn

from mmpre.batch import Picked, Row, pack
from mmpre.evaluation.cards import CardTask, member_of
from mmpre.evaluation.features import CHUNK_TOKENS, role_of, tokenized
from mmpre.evaluation.results import NotMeasured, Result, mean
from mmpre.evaluation.similarity import pairs
from mmpre.evaluation.subject import TRAIN_ROWS, Subject, title
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.units import first_of_unit
from mmpre.modality import Reader
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.recipe import Recipe
from mmpre.tokens import Tokens

ROWS = 500  # pairs at most: a sentence of n tokens is read n times


@dataclass(frozen=True)
class Speaker:
    """A network and the head that predicts a role's hidden ids, each from the state `before` places earlier."""

    role: str
    net: Network
    head: Vocabulary
    before: int = 0


def minimal_pairs(task: CardTask, subject: Subject) -> list[Result]:
    """The share of pairs whose right sentence (`input`) has the higher pseudo-log-likelihood; equal ones count half.

    Nothing is fitted and nothing chosen. Raises NotMeasured where no head predicts ids of the sentences' tokens.
    """
    speaker = _speaker(task, subject.recipe)
    score = {}
    for number, tokens, value in likelihoods(speaker, member_of(task.input), _sides(task, task.split, ROWS)):
        total, count = score.get(number, (0.0, 0))
        score[number] = total + value, count + tokens
    if not (whole := sorted(n // 2 for n in score if n % 2 == 0 and n + 1 in score)):
        raise NotMeasured(f"minimal pairs: {task.split} has no pair of {task.input} and {task.other} that can be read")
    right = [_beats(score[2 * number][0], score[2 * number + 1][0]) for number in whole]
    told = {"score": "pseudo-log-likelihood, the rest of a token's word hidden", "rows": ROWS,
            "tokens": sum(count for _, count in score.values())}  # fmt: skip
    return [mean(f"{title(task)}: right above wrong", right, chance=0.5, protocol=told)]


def by_counts(task: CardTask, subject: Subject) -> list[Result]:
    """The same by how often each piece is in the right sentences of train, one more counted of each."""
    member, network = member_of(task.input), subject.network
    if not subject.reads(member) or not (task.folder / task.train).is_dir():
        return []
    reader = network.readers[role_of(network.readers, member)]
    read = [(n, one) for n, one in tokenized(reader, member, _sides(task, task.train, TRAIN_ROWS)) if n % 2 == 0]
    if not read or any("ids" not in one.fields for _, one in read):
        return []
    count_V = np.bincount(np.concatenate([_ids(one) for _, one in read]))
    score: dict[int, float] = {}
    for number, tokens in tokenized(reader, member, _sides(task, task.split, ROWS)):
        count_N = np.append(count_V, 0)[np.minimum(_ids(tokens), len(count_V))]
        share_N = (count_N + 1) / (count_V.sum() + len(count_V) + 1)
        score[number] = score.get(number, 0.0) + float(np.log(share_N).sum())
    right = [_beats(score[n], score[n + 1]) for n in sorted(score) if n % 2 == 0 and n + 1 in score]
    return [mean(f"{title(task)}: right above wrong", right, chance=0.5, protocol={"score": "counts of pieces"})]


@torch.inference_mode()
def likelihoods(speaker: Speaker, member: str, samples: Iterable) -> Iterator[tuple[int, int, float]]:
    """For each window of each sentence its number, its ordinary tokens and the sum of their log-likelihoods, each
    hidden in turn (Salazar et al. 2020, arXiv:1910.14659), in nats.

    Where the reader tells words, what follows in a token's word is hidden with it (Kauf & Ivanova 2023,
    arXiv:2305.10588): a word's other pieces give it away.
    """
    device = next(speaker.net.parameters()).device
    reader: Reader = speaker.net.readers[speaker.role]
    rows: list[Row] = []
    waiting: list[tuple[int, int]] = []

    def values() -> Iterator[tuple[int, int, float]]:
        batch = pack(rows, speaker.net.attend.plan).to(device)
        picked = batch.picked["hidden"]
        state_nD = speaker.net(batch, at=batch.layout.at(speaker.role, picked.seen_M) - speaker.before)
        loss_n = batch.given(speaker.head(state_nD, batch.clean[speaker.role], picked.clean_M).double())
        for (number, count), part in zip(waiting, loss_n.split([count for _, count in waiting]), strict=True):
            yield number, count, -float(part.sum())

    for number, tokens in tokenized(reader, member, samples):
        some = list(_hidden(speaker.role, tokens))
        if rows and sum(row.length for row in rows) + len(tokens) * len(some) > CHUNK_TOKENS:
            yield from values()
            rows, waiting = [], []
        rows += some
        waiting.append((number, len(some)))
    if rows:
        yield from values()


def _hidden(role: str, tokens: Tokens) -> Iterator[Row]:
    """The sentence once for each of its ordinary tokens, which is hidden."""
    number_N = torch.arange(len(tokens))
    unit_N = first_of_unit(tokens, "word") if "word" in tokens.fields else number_N
    for i in (tokens.special_N < 0).nonzero().squeeze(1).tolist():
        replaced_N = (unit_N == unit_N[i]) & (number_N >= i)
        index_1 = torch.tensor([i])
        yield Row(
            str(i), {role: tokens}, {role: tokens}, {role: replaced_N}, {"hidden": Picked(role, index_1, index_1)}
        )


def _speaker(task: CardTask, recipe: Recipe) -> Speaker:
    """Where in the recipe's tasks ids of the wanted member are predicted."""
    member, heads = member_of(task.input), []
    for step in (one for stage in reversed(recipe.stages) for one in stage.tasks):
        readouts: Iterable[nn.Module] = step.objective.readouts if isinstance(step.objective, OnePass) else ()
        for readout in (one for one in readouts if isinstance(one, Predict)):
            role = step.view.picks[readout.pick].role
            heads.append(f"{type(readout.head).__name__} for {role}")
            if isinstance(readout.head, Vocabulary) and role_of({role: step.objective.net.readers[role]}, member):
                return Speaker(role, step.objective.net, readout.head, readout.before)
    raise NotMeasured(
        f"minimal pairs: wanted a task with a vocabulary head for .{member}, the run has "
        f"{', '.join(dict.fromkeys(heads)) or 'no head that predicts tokens'}; measure a run of masked prediction of "
        "text, such as bert"
    )


def _sides(task: CardTask, split: str, most: int) -> Iterator[tuple[int, object]]:
    """The right sentences with even numbers, each followed by the wrong one."""
    for number, _, (right, wrong) in pairs(task, split, most):
        yield 2 * number, right
        yield 2 * number + 1, wrong


def _ids(tokens: Tokens) -> np.ndarray:
    return tokens["ids"][tokens.special_N < 0].numpy()


def _beats(one: float, other: float) -> float:
    return 0.5 if isclose(one, other, rel_tol=1e-9) else float(one > other)  # equal but for the order of additions
