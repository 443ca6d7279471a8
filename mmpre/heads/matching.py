"""Say whether a row's roles belong together."""
# B rows, D model width

from jaxtyping import Float
from torch import Tensor, nn


class Matching(nn.Module):
    """BERT's pooler, tanh of a dense layer, then two scores; score 1 is for rows that match (UNITER's ITM).

    `out` is the width of the pooler's result, by default that of the states.
    """

    def __init__(self, width: int, out: int | None = None) -> None:
        super().__init__()
        self.pool = nn.Linear(width, out or width)
        self.classify = nn.Linear(out or width, 2)
        for layer in (self.pool, self.classify):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, state_BD: Float[Tensor, "B D"]) -> Float[Tensor, "B 2"]:
        return self.classify(self.pool(state_BD).tanh())
