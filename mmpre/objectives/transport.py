"""Optimal transport between two sets of states of the same row, by proximal points (IPOT).

Source: Xie et al. 2018, arXiv:1802.04307, as UNITER (Chen et al. 2019, arXiv:1909.11740) uses it to align words with
regions.
"""
# B rows, X and Y tokens of the two sides in the longest row, x and y tokens of one row, D model width

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from mmpre.layout import Layout

NORM_EPS = 1e-5


@dataclass(frozen=True, kw_only=True)
class IPOT:
    """Transport with equal mass on all tokens of a side, after a fixed number of proximal steps.

    The marginals of X are exact, those of Y within a percent or so. `beta` is the step: smaller ones take fewer
    iterations to the exact plan and are less stable.
    """

    beta: float = 0.5
    iterations: int = 50

    def __post_init__(self) -> None:
        if not self.beta > 0 or self.iterations < 1:
            raise ValueError(
                f"IPOT: beta must be above 0 and iterations at least 1, got beta {self.beta}, "
                f"iterations {self.iterations}"
            )

    @torch.no_grad()
    def plan(
        self, cost_BXY: Float[Tensor, "B X Y"], x_BX: Bool[Tensor, "B X"], y_BY: Bool[Tensor, "B Y"]
    ) -> Float[Tensor, "B X Y"]:
        """The plan T, mass 1 in each row, 0 outside the tokens that x_BX and y_BY say exist. A constant."""
        valid_BYX = y_BY[:, :, None] & x_BX[:, None]
        kernel_BYX = torch.where(valid_BYX, (cost_BXY.mT / -self.beta).exp(), 0.0)
        # The loop carries n T instead of T, and n delta instead of delta: that leaves one factor, n/m, in it. A padded
        # token's sum is 0 and gets 1 instead; its row of the plan stays 0.
        pad_BX1, pad_BY1 = (~x_BX)[:, :, None].float(), (~y_BY)[:, :, None].float()
        m_B11, n_B11 = x_BX.sum(1)[:, None, None], y_BY.sum(1)[:, None, None]
        ratio_B11 = n_B11 / m_B11
        sigma_BX1 = torch.ones_like(pad_BX1) / m_B11
        plan_BYX = kernel_BYX.clone()
        for i in range(self.iterations):
            if i:
                plan_BYX *= kernel_BYX
            delta_BY1 = torch.baddbmm(pad_BY1, plan_BYX, sigma_BX1).reciprocal_()
            sigma_BX1 = ratio_B11 / torch.baddbmm(pad_BX1, plan_BYX.mT, delta_BY1)
            plan_BYX *= delta_BY1 * sigma_BX1.mT
        return plan_BYX.mT / n_B11


DEFAULT = IPOT()  # as UNITER uses it


def cosine_cost(x_BXD: Float[Tensor, "B X D"], y_BYD: Float[Tensor, "B Y D"]) -> Float[Tensor, "B X Y"]:
    """1 - cosine, in float32."""
    x_BXD, y_BYD = (F.normalize(side.float(), dim=-1, eps=NORM_EPS) for side in (x_BXD, y_BYD))
    return 1 - x_BXD @ y_BYD.mT


def transport(x_XD: Float[Tensor, "x D"], y_YD: Float[Tensor, "y D"], ipot: IPOT = DEFAULT) -> Float[Tensor, "x y"]:
    """The plan between two sets of states, such as one row's words and regions, to look at."""
    every_1X, every_1Y = (torch.ones(1, len(side), dtype=torch.bool, device=side.device) for side in (x_XD, y_YD))
    return ipot.plan(cosine_cost(x_XD[None], y_YD[None]), every_1X, every_1Y)[0]


def distances(state_ND: Float[Tensor, "N D"], layout: Layout, roles: tuple[str, str], ipot: IPOT) -> Float[Tensor, "B"]:
    """The transport distance between two roles of each row; the gradient takes the plan as given."""
    with torch.autocast(state_ND.device.type, enabled=False):
        (x_BXD, x_BX), (y_BYD, y_BY) = (_padded(state_ND, layout, role) for role in roles)
        cost_BXY = cosine_cost(x_BXD, y_BYD)
        return (cost_BXY * ipot.plan(cost_BXY, x_BX, y_BY)).sum((1, 2))


def _padded(
    state_ND: Float[Tensor, "N D"], layout: Layout, role: str
) -> tuple[Float[Tensor, "B n D"], Bool[Tensor, "B n"]]:
    """A role's states of each row, padded with states of other tokens, and which are the role's own."""
    length_B = layout.lengths[role]
    offset_n = torch.arange(int(length_B.max()))
    valid_Bn = (offset_n < length_B[:, None]).to(state_ND.device, non_blocking=True)
    place_Bn = layout.first(role)[:, None] + offset_n.to(state_ND.device, non_blocking=True)
    place_Bn = place_Bn.clamp(max=layout.size - 1)
    return state_ND.index_select(0, place_Bn.flatten()).unflatten(0, place_Bn.shape), valid_Bn
