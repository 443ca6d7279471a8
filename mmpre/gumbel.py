"""Codes that a linear map of features chooses by chance; they learn from what is made of their vectors.

Source: vq-wav2vec, Baevski et al. 2019, arXiv:1910.05453, as wav2vec 2.0 has it, arXiv:2006.11477, section 2.
"""
# M tokens, E values of a token's features, G groups, V codes of a group, C values of a vector, c = C / G of its part

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpre.draw import Draw
from mmpre.schedules import ExponentialRamp, Ramp

COOLING = ExponentialRamp(first=2.0, last=0.1, factor=0.999995)


@dataclass(frozen=True)
class Chosen:
    """What tokens are coded as.

    `choice_MGV` is 1 for the code that was taken and 0 for all others, with the gradient of the soft choice.
    `share_MGV` is the softmax of the scores, without chance and temperature: its mean says how codes are used.
    """

    vector_MC: Float[Tensor, "M C"]
    choice_MGV: Float[Tensor, "M G V"]
    share_MGV: Float[Tensor, "M G V"]

    @property
    def code_MG(self) -> Int[Tensor, "M G"]:
        return self.choice_MGV.detach().max(2).indices

    def mean_share(self) -> Float[Tensor, "G V"]:
        return self.share_MGV.sum(0) / max(1, len(self.share_MGV))


class GumbelCodes(nn.Module):
    """`groups` codebooks of `codes` vectors, which are laid side by side to one of `size` values.

    While training a code is drawn by Gumbel's noise, at a temperature that depends on the step alone, and the gradient
    is that of the softmax it was drawn from. In evaluation it is the one of the highest score.
    """

    def __init__(self, features: int, codes: int, size: int, *, groups: int = 1, temperature: Ramp = COOLING) -> None:
        super().__init__()
        if codes < 2 or groups < 1 or size % groups:
            raise ValueError(
                f"GumbelCodes: wanted at least 2 codes, and values of a vector that groups can share out, got {codes} "
                f"codes, {size} values and {groups} groups"
            )
        self.codes, self.groups, self.temperature = codes, groups, temperature
        self.score = nn.Linear(features, groups * codes)
        self.vector_GVc = nn.Parameter(torch.empty(groups, codes, size // groups).uniform_())
        nn.init.normal_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, f_ME: Float[Tensor, "M E"], draw: Draw) -> Chosen:
        score_MGV = self.score(f_ME).float().unflatten(1, (self.groups, self.codes))
        if self.training:
            noise_MGV = torch.empty_like(score_MGV).exponential_(generator=draw.rng("gumbel", device=f_ME.device))
            soft_MGV = ((score_MGV - noise_MGV.log()) / self.temperature.at(draw.step)).softmax(2)
            choice_MGV = self._hardest(soft_MGV) - soft_MGV.detach() + soft_MGV
        else:
            choice_MGV = self._hardest(score_MGV)
        with torch.autocast(f_ME.device.type, enabled=False):
            vector_MGc = torch.einsum("mgv,gvc->mgc", choice_MGV, self.vector_GVc.float())
        return Chosen(vector_MGc.flatten(1), choice_MGV, score_MGV.softmax(2))

    @staticmethod
    def _hardest(x_MGV: Float[Tensor, "M G V"]) -> Float[Tensor, "M G V"]:
        return torch.zeros_like(x_MGV).scatter_(2, x_MGV.detach().max(2, keepdim=True).indices, 1.0)


def perplexity(share_GV: Float[Tensor, "G V"]) -> Float[Tensor, ""]:
    """e to the entropy, summed over groups: G V where all codes are taken alike, G where one is in each."""
    # not entr: where a share is 0 its gradient is infinite
    return (-share_GV * share_GV.clamp(min=1e-20).log()).sum(1).exp().sum()
