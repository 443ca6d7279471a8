"""Predict what a picked region showed: its feature, or the detector's classes for it (UNITER, arXiv:1909.11740)."""
# M picked regions, D model width, E values of a feature, C classes with 0 the background

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpre.heads.guess import Choice
from mmpre.heads.transform import Transform
from mmpre.tokens import Tokens


class RegionFeature(nn.Module):
    """Regress the feature (MRFR): Transform, then the input projection's own weight, transposed, and a bias.

    A region's loss is the mean over its E values, as in the authors' code; the paper writes the sum.
    """

    def __init__(self, tie: nn.Linear, *, field: str = "features", eps: float = 1e-12) -> None:
        super().__init__()
        self.field = field
        self.transform = Transform(tie.out_features, eps=eps)
        self.project = tie
        self.bias = nn.Parameter(torch.zeros(tie.in_features))

    def predict(self, state_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M E"]:
        return F.linear(self.transform(state_MD), self.project.weight.t(), self.bias)

    def forward(self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
        target_ME = tokens[self.field][index_M].float()
        return (self.predict(state_MD).float() - target_ME).square().mean(1)

    def measured(
        self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]
    ) -> tuple[Float[Tensor, "M"], Mapping[str, Float[Tensor, "M"]]]:
        return self(state_MD, tokens, index_M), {}


class ClassScores(nn.Module):
    """Transform, then a score for each class. Heads may share one, or its `transform`."""

    def __init__(self, width: int, classes: int, *, eps: float = 1e-12, transform: nn.Module | None = None) -> None:
        super().__init__()
        self.transform = Transform(width, eps=eps) if transform is None else transform
        self.classify = nn.Linear(width, classes)
        nn.init.normal_(self.classify.weight, std=0.02)
        nn.init.zeros_(self.classify.bias)

    def forward(self, state_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M C"]:
        return self.classify(self.transform(state_MD))


class RegionClass(nn.Module):
    """Cross-entropy with the detector's best class, the background left out of the choice (MRC)."""

    def __init__(self, scores: ClassScores, *, field: str = "soft") -> None:
        super().__init__()
        self.scores, self.field = scores, field

    def forward(self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
        return self.measured(state_MD, tokens, index_M)[0]

    def measured(
        self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]
    ) -> tuple[Float[Tensor, "M"], Mapping[str, Float[Tensor, "M"]]]:
        scores_MC, best_M = self.scores(state_MD), _best(tokens[self.field][index_M])
        loss_M = F.cross_entropy(scores_MC, best_M, reduction="none")
        return loss_M, {"accuracy": (_best(scores_MC.detach()) == best_M).float()}

    def guess(self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]) -> Choice:
        return Choice.of(self.field, _no_background(self.scores(state_MD)), _best(tokens[self.field][index_M]))


class RegionClassKL(nn.Module):
    """Divergence of the predicted distribution from the detector's, background kept (MRC-kl).

    Divided by the number of classes, as in the authors' code; the paper has no such factor.
    """

    def __init__(self, scores: ClassScores, *, field: str = "soft") -> None:
        super().__init__()
        self.scores, self.field = scores, field

    def forward(self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
        return self.measured(state_MD, tokens, index_M)[0]

    def measured(
        self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]
    ) -> tuple[Float[Tensor, "M"], Mapping[str, Float[Tensor, "M"]]]:
        scores_MC, soft_MC = self.scores(state_MD), tokens[self.field][index_M]
        loss_M = F.kl_div(scores_MC.float().log_softmax(1), soft_MC, reduction="none").mean(1)
        return loss_M, {"accuracy": (_best(scores_MC.detach()) == _best(soft_MC)).float()}

    def guess(self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]) -> Choice:
        return Choice.of(self.field, self.scores(state_MD), tokens[self.field][index_M].argmax(1))


def _best(classes_MC: Float[Tensor, "M C"]) -> Int[Tensor, "M"]:
    return classes_MC[:, 1:].argmax(1) + 1


def _no_background(scores_MC: Float[Tensor, "M C"]) -> Float[Tensor, "M C"]:
    return torch.cat([torch.full_like(scores_MC[:, :1], -torch.inf), scores_MC[:, 1:]], dim=1)
