"""A small network writes what it thinks likely into a row; another reads it. And: which tokens are not the row's own?

Source of both: ELECTRA, Clark et al. 2020, arXiv:2003.10555.
"""
# N places of the packed batch, M picked tokens, V ids

from collections.abc import Iterator, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmpre.batch import Batch
from mmpre.draw import Draw
from mmpre.heads.guess import Guess
from mmpre.heads.score import Score
from mmpre.heads.vocabulary import Vocabulary
from mmpre.masking.fill import Show
from mmpre.masking.on_device import hide
from mmpre.modality import Reader
from mmpre.network import Network
from mmpre.objectives.loss import Loss, Term
from mmpre.objectives.one_pass import OnePass, Predict


class Sampled(nn.Module):
    """A generator learns to predict the picked tokens; `then` learns from rows in which its samples stand for them.

    Samples come from the generator's softmax, whose scores are divided by `temperature`, without a gradient through
    them; all other places show the row's own tokens. Where `own` is False the right token is never drawn. `name` is
    that of the generator's term, which is divided by the number of picked tokens.
    """

    def __init__(
        self,
        generator: Network,
        pick: str,
        head: Vocabulary,
        then: OnePass,
        *,
        temperature: float = 1.0,
        own: bool = True,
        name: str = "generator",
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"Sampled: temperature must be above 0, got {temperature}; 1 samples as the softmax says")
        self.guess = OnePass(generator, [Predict(pick, head, name=name)])
        self.then, self.temperature, self.own = then, temperature, own

    @property
    def readers(self) -> Mapping[str, Reader]:
        return self.then.readers

    def forward(self, batch: Batch, draw: Draw) -> Loss:
        predict = self.guess.readouts[0]
        picked, per, head = batch.picked[predict.pick], f"picked:{predict.pick}", predict.head
        score_MV = head.scores(self.guess.states(predict, batch))
        id_M = batch.clean[picked.role][head.field].index_select(0, picked.clean_M)
        loss = head.loss(score_MV, id_M).float().sum()
        right = (score_MV.detach().max(1).indices == id_M).sum()
        shown = self._shown(score_MV.detach(), batch, draw)
        rest = self.then(shown, draw)
        return Loss(
            [Term(predict.name, loss, per), *rest.terms], {f"{predict.name}_accuracy": (right, per), **rest.metrics}
        )

    @torch.no_grad()
    def shown(self, batch: Batch, draw: Draw) -> Batch:
        """The batch that `then` reads."""
        predict = self.guess.readouts[0]
        return self._shown(predict.head.scores(self.guess.states(predict, batch)), batch, draw)

    def guesses(self, batch: Batch) -> Iterator[tuple[str, Guess]]:
        """What the generator takes hidden tokens for."""
        yield from self.guess.guesses(batch)

    def _shown(self, score_MV: Float[Tensor, "M V"], batch: Batch, draw: Draw) -> Batch:
        predict = self.guess.readouts[0]
        picked, field = batch.picked[predict.pick], predict.head.field
        id_M = batch.clean[picked.role][field].index_select(0, picked.clean_M)
        # whose exponential clock rings first, clocks going at the speed of the probabilities (Gumbel's way of drawing)
        clock_MV = torch.empty(score_MV.shape, dtype=torch.float32, device=score_MV.device)
        clock_MV.exponential_(generator=draw.rng("sample", device=score_MV.device))
        chance_MV = score_MV.float() / self.temperature - clock_MV.log_()
        if not self.own:
            chance_MV.scatter_(1, id_M[:, None], -torch.inf)
        drawn_M = chance_MV.max(1).indices  # argmax takes three times as long on a CPU
        return hide(batch, predict.pick, picked.role, picked.clean_M, Show(field, drawn_M), draw)


class Detect(nn.Module):
    """Tell which tokens of a role show another value of `field` than the row's own, of all tokens of the layout.

    With `pick`, of the picked ones alone. The loss is a binary cross-entropy, its term divided by the number of
    tokens that are judged. A token that was sampled, or replaced by chance, and is right all the same, is the row's
    own. Most tokens are, so what is worth watching is not the accuracy but, of those that were replaced, how many are
    caught (`NAME_caught` divided by `NAME_replaced`), and `NAME_auc`: how often a replaced token has a higher score
    than one of the row's own (the area under the ROC curve), within each part of a step.
    """

    def __init__(
        self, role: str, head: Score, *, field: str = "ids", pick: str | None = None, name: str = "replaced",
        weight: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.role, self.head, self.field, self.pick, self.name, self.weight = role, head, field, pick, name, weight

    def places(self, batch: Batch) -> Int[Tensor, "M"] | None:
        return None if self.pick is None else batch.layout.at(self.role, batch.picked[self.pick].seen_M)

    def truth(self, batch: Batch) -> Bool[Tensor, "M"]:
        """Which of the tokens that are judged are not the row's own."""
        clean_N, seen_N = _place_by_place("Detect", batch, self.role, self.field)
        other_N = clean_N != seen_N
        if self.pick is not None:
            return other_N.index_select(0, batch.picked[self.pick].seen_M)
        every_N = other_N.new_zeros(batch.layout.size)
        return every_N.index_copy(0, batch.layout.index[self.role], other_N)

    def read(self, state_MD: Float[Tensor, "M D"], batch: Batch, draw: Draw) -> Loss:
        per = "tokens" if self.pick is None else f"picked:{self.pick}"
        score_M, true_M = self.head(state_MD).float(), self.truth(batch)
        loss = F.binary_cross_entropy_with_logits(score_M, true_M.float(), reduction="sum")
        said_M = score_M.detach() > 0
        seen = {"accuracy": said_M == true_M, "replaced": true_M, "caught": said_M & true_M}
        metrics = {f"{self.name}_{name}": (value_M.sum(), per) for name, value_M in seen.items()}
        metrics[f"{self.name}_auc"] = area_under_roc(score_M.detach(), true_M) * len(score_M), per
        return Loss([Term(self.name, loss, per, self.weight)], metrics)


class CopyOrGuess(nn.Module):
    """Predict the id that each token of a role has in the row itself: the one that is shown, or one that is guessed.

    A `gate` says how likely the shown one is the row's own; what is left goes to the softmax of `head`. The term counts
    all tokens of the role, special ones too, and is divided by the number of tokens.
    Source: All-Tokens MLM, ELECTRA's ablation (section 3.5).
    """

    def __init__(self, role: str, gate: Score, head: Vocabulary, *, name: str = "every") -> None:
        super().__init__()
        self.role, self.gate, self.head, self.name = role, gate, head, name

    def places(self, batch: Batch) -> Int[Tensor, "M"]:
        return batch.layout.index[self.role]

    def read(self, state_MD: Float[Tensor, "M D"], batch: Batch, draw: Draw) -> Loss:
        own_M, shown_M = _place_by_place("CopyOrGuess", batch, self.role, self.head.field)
        score_MV, gate_M, same_M = self.head.scores(state_MD), self.gate(state_MD).float(), own_M == shown_M
        guessed_M = F.logsigmoid(-gate_M) - self.head.loss(score_MV, own_M).float()
        chance_M = torch.where(same_M, torch.logaddexp(F.logsigmoid(gate_M), guessed_M), guessed_M)
        right_M = (score_MV.detach().max(1).indices == own_M) & ~same_M
        seen = {"replaced": ~same_M, "right": right_M}
        metrics = {f"{self.name}_{name}": (value_M.sum(), "tokens") for name, value_M in seen.items()}
        return Loss([Term(self.name, -chance_M.sum(), "tokens")], metrics)


def _place_by_place(who: str, batch: Batch, role: str, field: str) -> tuple[Tensor, Tensor]:
    """A role's values in the row itself, and as they are shown."""
    clean_N, seen_N = batch.clean[role][field], batch.seen[role][field]
    if len(clean_N) != len(seen_N):
        raise ValueError(
            f"{who}: tokens are compared place by place, but {len(clean_N)} clean ones of role {role!r} became "
            f"{len(seen_N)}; use a corruption that moves none"
        )
    return clean_N, seen_N


def area_under_roc(score_M: Float[Tensor, "M"], true_M: Bool[Tensor, "M"]) -> Float[Tensor, ""]:
    """How often a true one has a higher score than one that is not, equal ones counting half; 0.5 without such pairs.

    By ranks (Mann and Whitney 1947), with no shape that depends on values.
    """
    sorted_M = score_M.sort().values
    below_M, upto_M = (torch.searchsorted(sorted_M, score_M, right=right) for right in (False, True))
    rank_M = (below_M + upto_M + 1).double() / 2
    true, other = true_M.sum().double(), (~true_M).sum().double()
    above = torch.where(true_M, rank_M, 0.0).sum() - true * (true + 1) / 2
    return torch.where(true * other > 0, above / (true * other).clamp(min=1), 0.5)
