"""One score for each state."""
# M states, D model width

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class Score(nn.Module):
    """A dense layer, GELU, and a linear map to one number, the logit of a yes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.score = nn.Linear(width, 1)
        for layer in (self.dense, self.score):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, state_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M"]:
        return self.score(F.gelu(self.dense(state_MD)))[:, 0]
