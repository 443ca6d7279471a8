"""The layer that BERT's heads put before their last one."""
# M states, D model width

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Transform(nn.Module):
    """LayerNorm(GELU(dense(state)))."""

    def __init__(self, width: int, *, eps: float = 1e-12) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, state_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        return self.norm(F.gelu(self.dense(state_MD)))
