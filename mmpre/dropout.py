"""Dropout that costs little on a CPU: four elements share one 64-bit random number.

torch's own draws a number per element, which at width 768 is a tenth of a feed-forward's time there; this takes a
fifth of that. On other devices torch's kernels are used. Both draw from torch's default generator.
"""

# N tokens of the packed batch, B rows, H heads, K width of a head

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
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


class DropHeads(nn.Module):
    """While training, set what whole heads of attention say to 0, each head of a row with a chance of p.

    Those that are kept are scaled up by their share; a row that would lose all heads keeps them all.
    Source: Zhou et al. 2020 (Scheduled DropHead), arXiv:2004.13342; as Mirror-BERT's augmentation, arXiv:2104.08027,
    whose code divides by 0 where all are dropped.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"DropHeads: p must be at least 0 and below 1, got {p}; a fifth is 0.2, none is 0")
        self.p = p

    def forward(self, y_NHK: Float[Tensor, "N H K"], row_N: Int[Tensor, "N"], rows: int) -> Float[Tensor, "N H K"]:
        if not self.p or not self.training:
            return y_NHK
        keep_BH, _ = keep_like(y_NHK.new_empty(rows, y_NHK.shape[1]), self.p)
        kept_B1 = keep_BH.sum(1, keepdim=True)
        factor_BH = torch.where(kept_B1 > 0, keep_BH * y_NHK.shape[1] / kept_B1.clamp(min=1), 1.0)
        return y_NHK * factor_BH.to(y_NHK.dtype).index_select(0, row_N)[:, :, None]

    def extra_repr(self) -> str:
        return f"p={self.p}"
