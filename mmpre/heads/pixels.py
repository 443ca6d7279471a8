"""Predict the pixels of a picked patch."""
# N tokens, M picked tokens, D width of the states, E values of a patch

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpre.heads.guess import Restored
from mmpre.tokens import Tokens


class Pixels(nn.Module):
    """A linear map to a patch's values and their mean squared error (or `absolute`), one number a patch.

    `transform` comes before the map, where there is one. `values` gives the clean values of all tokens (a modality's
    `features`), `size` says how many a token has. With `normalise` the target is a patch's values minus their mean,
    divided by their deviation (unbiased, as in the authors' code), so that contrast does not weigh; `eps` is added to
    the variance. It also measures `flat`, what predicting each patch's own mean would cost, squared: about 1 where
    targets are normalised, 0 for a patch of one colour.
    Source: He et al. 2021, arXiv:2111.06377, section 3.
    """

    def __init__(
        self,
        width: int,
        size: int,
        values: Callable[[Tokens], Float[Tensor, "N E"]],
        *,
        normalise: bool = True,
        eps: float = 1e-6,
        absolute: bool = False,
        transform: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.values, self.normalise, self.eps, self.absolute = values, normalise, eps, absolute
        self.transform = nn.Identity() if transform is None else transform
        self.project = nn.Linear(width, size)
        nn.init.xavier_uniform_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def predict(self, state_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M E"]:
        return self.project(self.transform(state_MD))

    @torch.no_grad()
    def target(self, tokens: Tokens, index_M: Int[Tensor, "M"]) -> tuple[Float[Tensor, "M E"], Float[Tensor, "M"]]:
        """What is to be predicted, and what predicting each patch's own mean would cost."""
        value_ME = self.values(tokens).index_select(0, index_M).float()
        var_M1, mean_M1 = torch.var_mean(value_ME, dim=1, keepdim=True)
        flat_M = var_M1[:, 0] * (1 - 1 / value_ME.shape[1])
        if not self.normalise:
            return value_ME, flat_M
        return (value_ME - mean_M1) / (var_M1 + self.eps).sqrt(), flat_M / (var_M1[:, 0] + self.eps)

    def forward(self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
        return self.measured(state_MD, tokens, index_M)[0]

    def measured(
        self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]
    ) -> tuple[Float[Tensor, "M"], Mapping[str, Float[Tensor, "M"]]]:
        target_ME, flat_M = self.target(tokens, index_M)
        error_ME = self.predict(state_MD).float() - target_ME
        return (error_ME.abs() if self.absolute else error_ME.square()).mean(1), {"flat": flat_M}

    def guess(self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]) -> Restored:
        """Where targets are normalised, the patch's own mean and deviation are put back, as in the authors' pictures:
        the head was never asked for them."""
        value_ME = self.predict(state_MD).float()
        if not self.normalise:
            return Restored(value_ME)
        true_ME = self.values(tokens).index_select(0, index_M).float()
        var_M1, mean_M1 = torch.var_mean(true_ME, dim=1, keepdim=True)
        return Restored(value_ME * (var_M1 + self.eps).sqrt() + mean_M1)
