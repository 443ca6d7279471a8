"""LAMB: Adam's direction, in each matrix scaled to the length of the matrix.

Source: algorithm 2 of You et al. 2019, arXiv:1904.00962, with the identity for its function phi. timm has a LAMB as
well; here every parameter counts its own steps, as torch's optimizers do, so that one which rests in some tasks is
corrected for its own bias and a checkpoint holds all there is.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from mmpre.training.uncompiled import spare_compiler


class Lamb(torch.optim.Optimizer):
    """Groups may say otherwise: without `adapt` nothing is scaled, so the step is Adam's; without `correct` the moments
    are taken as they are, though they start at 0, as the Adam of BERT's authors does."""

    def __init__(
        self, groups: Iterable[dict], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ) -> None:
        defaults = {"adapt": True, "correct": True}
        spare_compiler()
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **defaults})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, weight.grad, group)

    def _update(self, weight: Tensor, grad: Tensor, group: dict) -> None:
        state = self.state[weight]
        if not state:
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(weight)}
            state["exp_avg_sq"] = torch.zeros_like(weight)
        (first, second), (m, v) = group["betas"], (state["exp_avg"], state["exp_avg_sq"])
        state["step"] += 1
        count = state["step"].item() if group["correct"] else math.inf  # both divisors are then 1
        m.lerp_(grad, 1 - first)
        v.mul_(second).addcmul_(grad, grad, value=1 - second)
        root = (v / (1 - second**count)).sqrt_().add_(group["eps"])
        direction = (m / (1 - first**count)).div_(root).add_(weight, alpha=group["weight_decay"])
        ratio = 1.0
        if group["adapt"]:
            length, step = weight.norm(), direction.norm()
            # a weight that is 0, or does not move, has no length to scale to
            ratio = torch.where((length > 0) & (step > 0), length / step, torch.ones_like(length))
        weight.sub_(direction.mul_(ratio * group["lr"]))
