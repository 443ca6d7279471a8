"""Dropout that costs little on a CPU: four elements share one 64-bit random number.

torch's own draws a number per element, which at width 768 is a tenth of a feed-forward's time there; this takes a
fifth of that. On other devices torch's kernels are used. Both draw from torch's default generator.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

LOWEST, HIGHEST = -(2**63), 2**63 - 1
STEPS = 2**16  # probabilities are rounded to 1/65536; the scale is that of the rounded one


def keep_like(x: Float[Tensor, "..."], p: float) -> tuple[Float[Tensor, "..."], float]:
    """Return 1 for each element that is kept and 0 for each that is dropped, and what to multiply by: 1 / (1 - p)."""
    if x.device.type != "cpu":
        return torch.empty_like(x).bernoulli_(1 - p), 1 / (1 - p)
    dropped = min(round(p * STEPS), STEPS - 1)
    words = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(LOWEST, HIGHEST)
    number = words.view(torch.int16)[: x.numel()].view(x.shape)
    keep = torch.ge(number, dropped - STEPS // 2, out=torch.empty(x.shape, dtype=x.dtype))
    return keep, STEPS / (STEPS - dropped)


class Dropout(nn.Module):
    """Set a share p of the elements to 0 while training, and scale the others up. With p = 0 nothing is called."""

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"Dropout: p must be at least 0 and below 1, got {p}; a tenth is 0.1, none is 0")
        self.p = p

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        if not self.p or not self.training:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        keep, scale = keep_like(x, self.p)
        return torch.addcmul(x.new_zeros(()), x, keep, value=scale)

    def add(self, x: Float[Tensor, "..."], y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Return x + dropout(y)."""
        if not self.p or not self.training:
            return x + y
        if x.device.type != "cpu":
            return x + F.dropout(y, self.p)
        keep, scale = keep_like(y, self.p)
        return torch.addcmul(x, y, keep, value=scale)

    def extra_repr(self) -> str:
        return f"p={self.p}"
