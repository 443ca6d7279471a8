"""What objectives take hidden tokens for: words and classes with probabilities, pictures with what was filled in."""
# M picked tokens, N tokens of one row, K best values

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mmpre.heads.guess import Choice, Guess, Guessing, Restored
from mmpre.recipe import Task
from mmpre.report.drawing import Drawn, draw, letters
from mmpre.report.opened import Opened, Shown, modality_of
from mmpre.show import Restores, Says
from mmpre.tokens import Tokens
from mmpre.view import View

ROWS = 6  # of a task that are shown
CHOICES = 8  # hidden tokens of a row whose guesses are listed


@dataclass(frozen=True)
class Taken:
    """One hidden token: what it was, what it was taken for with the probability of each, and whether that is right."""

    place: str
    true: str
    best: Sequence[tuple[str, float]]
    right: bool


@dataclass(frozen=True)
class Example:
    """A row: its roles with what is hidden, what hidden tokens were taken for, and roles as they were filled in."""

    key: str
    roles: Sequence[Drawn]
    taken: Sequence[Taken] = ()
    more: int = 0
    filled: Sequence[tuple[str, Drawn]] = ()


@dataclass(frozen=True)
class Predictions:
    title: str
    about: str
    examples: Sequence[Example] = field(default_factory=list)
    template: str = "predictions.html"

    @property
    def broad(self) -> bool:
        """Whether rows are drawn so wide that two do not stand beside each other."""
        return any(drawn.broad for example in self.examples for drawn in example.roles)


def panels(opened: Opened) -> Iterator[Predictions]:
    """A panel for each task whose objective can be asked for guesses, and for what other tasks hide beside that."""
    seen: set[str] = set()
    for guessed in (True, False):
        for task in opened.tasks:
            view = task.held_out or task.view
            if isinstance(view, Mapping) or not view.picks or (set(view.picks) <= seen and not guessed):
                continue
            rows = opened.rows(view, task.objective.readers, ROWS)
            found = [example(opened, task, view, one, guessed=guessed) for one in rows]
            if found := [one for one in found if one is not None]:
                seen |= set(view.picks)
                about = "what is hidden, and what it is taken for" if guessed else "what is hidden"
                if not any(_hides(view, pick) for pick in view.picks):
                    about = "what goes in, and what comes out"
                yield Predictions(task.name, about, found)


@torch.no_grad()
def example(opened: Opened, task: Task, view: View, shown: Shown, *, guessed: bool) -> Example | None:
    """One row of a task; None where guesses are wanted and its objective makes none."""
    row, readers, guesses = shown.row, task.objective.readers, []
    if guessed and isinstance(task.objective, Guessing):
        guesses = list(task.objective.guesses(opened.batch([row], view)))
    if guessed and not guesses:
        return None
    roles, taken, filled = [], [], []
    for role, tokens in row.clean.items():
        hidden_N = torch.zeros(len(tokens), dtype=torch.bool)
        for name, pick in row.picked.items():
            if pick.role == role and _hides(view, name):
                hidden_N[pick.clean_M] = True
        reader = view.readers.get(role, readers[role])
        about = [(pick, guess) for pick, guess in guesses if row.picked[pick].role == role]
        values = [(pick, guess) for pick, guess in about if isinstance(guess, Restored)]
        modality = modality_of(task.objective, role)
        if values and isinstance(modality, Restores):
            nothing_N = torch.zeros_like(hidden_N)
            filled.append(("the row", draw(reader, role, tokens, nothing_N, shown.sample)))
            if hidden_N.any():
                filled.append(("what is seen", draw(reader, role, tokens, hidden_N, shown.sample)))
            for pick, guess in values:
                made = _restored(modality, tokens, row.picked[pick].clean_M, guess)
                filled.append(
                    ("filled in" if hidden_N.any() else "restored", draw(reader, role, made, nothing_N, shown.sample))
                )
        else:
            roles.append(draw(reader, role, tokens, hidden_N, shown.sample))
        for pick, guess in about:
            if isinstance(guess, Choice):
                taken += _taken(opened, reader, tokens, row.picked[pick].clean_M, guess)
    return Example(row.key, roles, taken[:CHOICES], max(0, len(taken) - CHOICES), filled)


def _hides(view: View, pick: str) -> bool:
    """Whether a view hides what a pick takes (some are predicted while they are seen)."""
    name = pick.partition(".")[0]  # what a corruption adds to a pick is called PICK.NAME
    return (view.corruption.get(name) if isinstance(view.corruption, Mapping) else view.corruption) is not None


def _restored(modality: Restores, tokens: Tokens, index_M: Int[Tensor, "M"], guess: Guess) -> Tokens:
    """The row with what was predicted in place of what was hidden."""
    device = guess.value_ME.device
    f_NE = modality.features(tokens.to(device)).clone()
    f_NE[index_M.to(device)] = guess.value_ME.to(f_NE.dtype)
    return modality.restored(tokens.to(device), f_NE).to("cpu")


def _taken(opened: Opened, reader, tokens: Tokens, index_M: Int[Tensor, "M"], guess: Choice) -> list[Taken]:
    true = _names(opened, reader, tokens, index_M, guess.field, guess.true_M.cpu())
    best_MK, share_MK = guess.best_MK.cpu(), guess.share_MK.cpu()
    columns = [_names(opened, reader, tokens, index_M, guess.field, best_MK[:, k]) for k in range(best_MK.shape[1])]
    right_M: Bool[Tensor, "M"] = best_MK[:, 0] == guess.true_M.cpu()
    says = isinstance(reader, Says)
    return [
        Taken("" if says else str(int(i) + 1), true[m], [(c[m], float(share_MK[m, k])) for k, c in enumerate(columns)],
              bool(right_M[m]))
        for m, i in enumerate(index_M.tolist())
    ]  # fmt: skip


def _names(
    opened: Opened, reader, tokens: Tokens, index_M: Int[Tensor, "M"], name: str, value_M: Int[Tensor, "M"]
) -> list[str]:
    """What values of a field are called: by the tokens' letters, by the data's card, or by their numbers."""
    field_N = tokens[name]
    if isinstance(reader, Says) and field_N.ndim == 1 and len(field_N) == len(tokens):
        put = tokens.with_values(**{name: field_N.index_copy(0, index_M, value_M.to(field_N.dtype))})
        texts = reader.texts(put)
        return [letters(texts[i]) for i in index_M.tolist()]
    classes = opened.card.get("classes")
    if isinstance(classes, list) and field_N.ndim == 2 and len(classes) == field_N.shape[1]:
        return [str(classes[value]) for value in value_M.tolist()]
    return [str(value) for value in value_M.tolist()]
