"""The layer that BERT's heads put before their last one."""
# M states, D model width, E width that the head asks for

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Transform(nn.Module):
    """LayerNorm(GELU(dense(state))), in the states' width unless `out` says otherwise; with biases or without any."""

    def __init__(
        self, width: int, out: int | None = None, *, eps: float = 1e-12, bias: bool = True, std: float = 0.02
    ) -> None:
        super().__init__()
        self.width, out = width, out or width
        self.dense = nn.Linear(width, out, bias=bias)
        self.norm = nn.LayerNorm(out, eps=eps, bias=bias)
        nn.init.normal_(self.dense.weight, std=std)
        if bias:
            nn.init.zeros_(self.dense.bias)

    def forward(self, state_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M E"]:
        return self.norm(F.gelu(self.dense(state_MD)))
