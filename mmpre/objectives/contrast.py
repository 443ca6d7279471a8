"""Two vectors of each row that shall know each other among those of all rows of the step."""
# B rows of a step, D width of the vectors

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mmpre.batch import Views
from mmpre.draw import Draw
from mmpre.heads.pool import Tower
from mmpre.modality import Reader
from mmpre.objectives.loss import Loss, Term


class Pairing(Protocol):
    """A loss over the vectors of two sides, of length 1, where row i belongs to row i: its sum over the rows."""

    def __call__(self, a_BD: Float[Tensor, "B D"], b_BD: Float[Tensor, "B D"]) -> Float[Tensor, ""]: ...


class InfoNCE(nn.Module):
    """Each row's partner among all of the other side, by softmax over cosines divided by a temperature.

    With `both` the mean of both directions (CLIP, Radford et al. 2021, arXiv:2103.00020), else a finds b alone. A
    learned temperature is kept as the logarithm of its inverse, which does not pass `most`.
    """

    def __init__(self, temperature: float, *, both: bool = True, learned: bool = False, most: float = 100.0) -> None:
        super().__init__()
        _check(temperature)
        self.both, self.most = both, most
        log_scale = -torch.tensor(temperature).log()
        self.log_scale = nn.Parameter(log_scale) if learned else None
        self.scale = 1 / temperature

    def forward(self, a_BD: Float[Tensor, "B D"], b_BD: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
        scale = self.scale if self.log_scale is None else self.log_scale.exp().clamp(max=self.most)
        score_BB = a_BD @ b_BD.mT * scale
        own_B = torch.arange(len(score_BB), device=score_BB.device)
        loss = F.cross_entropy(score_BB, own_B, reduction="sum")
        return (loss + F.cross_entropy(score_BB.mT, own_B, reduction="sum")) / 2 if self.both else loss


class NTXent(nn.Module):
    """Each vector's partner among all others of both sides, 2B - 1 of them; a row's loss is the mean of its two.

    Source: SimCLR, Chen et al. 2020, arXiv:2002.05709.
    """

    def __init__(self, temperature: float) -> None:
        super().__init__()
        _check(temperature)
        self.temperature = temperature

    def forward(self, a_BD: Float[Tensor, "B D"], b_BD: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
        both_CD, rows = torch.cat([a_BD, b_BD]), len(a_BD)
        score_CC = both_CD @ both_CD.mT / self.temperature
        score_CC = score_CC.masked_fill(torch.eye(2 * rows, dtype=torch.bool, device=score_CC.device), -torch.inf)
        partner_C = torch.arange(2 * rows, device=score_CC.device).roll(rows)
        return F.cross_entropy(score_CC, partner_C, reduction="sum") / 2


class SigLIP(nn.Module):
    """Each pair on its own: does it belong together? By sigmoid, with a learned scale and bias.

    Source: Zhai et al. 2023, arXiv:2303.15343, with its first values of scale (10) and bias (-10).
    """

    def __init__(self, scale: float = 10.0, bias: float = -10.0) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(scale).log())
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, a_BD: Float[Tensor, "B D"], b_BD: Float[Tensor, "B D"]) -> Float[Tensor, ""]:
        score_BB = a_BD @ b_BD.mT * self.log_scale.exp() + self.bias
        sign_BB = 2 * torch.eye(len(score_BB), device=score_BB.device) - 1
        return -F.logsigmoid(sign_BB * score_BB).sum()


class Contrast(nn.Module):
    """Vectors of two views of each sample, compared over all rows of the step, whatever processes share it.

    `towers` are two, each by the name of the view it reads. The loss is per row. It also measures how often a row's
    own partner is the nearest, from the first side to the second.
    """

    def __init__(self, towers: Mapping[str, Tower], pairing: nn.Module, *, name: str = "contrast") -> None:
        super().__init__()
        if len(towers) != 2:
            raise ValueError(f"Contrast: wanted two towers by the names of their views, got {sorted(towers)}")
        self.towers, self.pairing, self.name = nn.ModuleDict(towers), pairing, name

    @property
    def readers(self) -> Mapping[str, Reader]:
        found: dict[str, Reader] = {}
        for tower in self.towers.values():
            for role, reader in tower.net.readers.items():
                if found.setdefault(role, reader) is not reader:
                    raise ValueError(f"Contrast: two towers read role {role!r} in two ways; give the roles two names")
        return found

    def features(self, batch: Views, draw: Draw) -> dict[str, Tensor]:
        return {
            name: F.normalize(batch[name].given(tower(batch[name])).float(), dim=-1)
            for name, tower in self.towers.items()
        }

    def loss(self, features: Mapping[str, Tensor], counts: Sequence[int]) -> Loss:
        a_BD, b_BD = (features[name] for name in self.towers)
        nearest_B = (a_BD @ b_BD.mT).detach().argmax(1)
        right = (nearest_B == torch.arange(len(a_BD), device=a_BD.device)).sum()
        return Loss([Term(self.name, self.pairing(a_BD, b_BD), "rows")], {f"{self.name}_accuracy": (right, "rows")})


def _check(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"contrast: temperature must be above 0, got {temperature}; 0.05 and 0.07 are usual")
