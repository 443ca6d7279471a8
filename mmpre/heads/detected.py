"""What a detector said of a region: its labels, each weighed by how sure the detector was, and its feature."""
# M picked regions, D model width, E values of a feature, C labels

from collections.abc import Mapping

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpre.heads.guess import Choice
from mmpre.heads.region import ClassScores
from mmpre.tokens import Tokens


class SureLabel(nn.Module):
    """Cross-entropy with the detector's label, times its confidence in it (detected-label classification of LXMERT).

    `field` holds the labels, counted from 0, FIELD_confidence a number from 0 to 1 for each.
    Source: Tan & Bansal 2019, arXiv:1908.07490; the confidence is in the authors' code alone.
    """

    def __init__(self, scores: ClassScores, *, field: str) -> None:
        super().__init__()
        self.scores, self.field = scores, field

    def forward(self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
        return self.measured(state_MD, tokens, index_M)[0]

    def measured(
        self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]
    ) -> tuple[Float[Tensor, "M"], Mapping[str, Float[Tensor, "M"]]]:
        scores_MC, label_M = self.scores(state_MD), tokens[self.field][index_M]
        sure_M = tokens[f"{self.field}_confidence"][index_M].float()
        loss_M = F.cross_entropy(scores_MC.float(), label_M, reduction="none") * sure_M
        return loss_M, {"accuracy": (scores_MC.detach().argmax(1) == label_M).float()}

    def guess(self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]) -> Choice:
        return Choice.of(self.field, self.scores(state_MD), tokens[self.field][index_M])


class SmoothFeature(nn.Module):
    """Regress a feature by `transform` and a linear map of its own; the loss is the smooth L1, mean over its values.

    Source: RoI-feature regression of LXMERT, Tan & Bansal 2019, arXiv:1908.07490, whose paper says L2; the authors'
    code takes the smooth L1.
    """

    def __init__(self, transform: nn.Module, width: int, size: int, *, field: str = "features") -> None:
        super().__init__()
        self.transform, self.field = transform, field
        self.project = nn.Linear(width, size)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    def predict(self, state_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M E"]:
        return self.project(self.transform(state_MD))

    def forward(self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
        target_ME = tokens[self.field][index_M].float()
        return F.smooth_l1_loss(self.predict(state_MD).float(), target_ME, reduction="none").mean(1)

    def measured(
        self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]
    ) -> tuple[Float[Tensor, "M"], Mapping[str, Float[Tensor, "M"]]]:
        return self(state_MD, tokens, index_M), {}
