"""Which of many answers is right for a row."""
# B rows, D model width, A answers

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Answers(nn.Module):
    """tanh of a pooling layer, which other heads may share, twice as wide with GELU and LayerNorm, and a score each.

    Source: image question answering of LXMERT, Tan & Bansal 2019, arXiv:1908.07490, in the authors' code.
    """

    def __init__(self, pool: nn.Linear, answers: int, *, eps: float = 1e-12) -> None:
        super().__init__()
        width = pool.out_features
        self.pool = pool
        self.dense = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(2 * width, eps=eps)
        self.answer = nn.Linear(2 * width, answers)
        for layer in (self.dense, self.answer):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, state_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B A"]:
        return self.answer(self.norm(F.gelu(self.dense(self.pool(state_BD).tanh()))))
