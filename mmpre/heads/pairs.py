"""Say which pairs of tokens belong together."""
# M ends of pairs, P = M / 2 pairs, D model width

import math
from collections.abc import Mapping

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpre.tokens import Tokens


class PairScores(nn.Module):
    """The dot product of two states, and its cross-entropy with whether the pair was there (see masking/pairs.py).

    Picked tokens come two for each pair, and a pair's loss stands at both of its ends. With `scaled` the product is
    divided by the root of the width: states that were normalised have products as large as the width, which saturates
    the sigmoid; the paper does not say that it does so.
    Source: GraphCodeBERT, Guo et al. 2020, arXiv:2009.08366, section 4.
    """

    def __init__(self, *, field: str = "edge", scaled: bool = True) -> None:
        super().__init__()
        self.field, self.scaled = field, scaled

    def scores(self, state_MD: Float[Tensor, "M D"]) -> Float[Tensor, "P"]:
        one_PD, other_PD = state_MD.float().unflatten(0, (len(state_MD) // 2, 2)).unbind(1)
        score_P = (one_PD * other_PD).sum(1)
        return score_P / math.sqrt(state_MD.shape[1]) if self.scaled else score_P

    def forward(self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
        return self.measured(state_MD, tokens, index_M)[0]

    def measured(
        self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]
    ) -> tuple[Float[Tensor, "M"], Mapping[str, Float[Tensor, "M"]]]:
        score_P, true_P = self.scores(state_MD), tokens[f"{self.field}_true"].float()
        loss_P = F.binary_cross_entropy_with_logits(score_P, true_P, reduction="none")
        right_P = ((score_P.detach() > 0) == (true_P > 0)).float()
        return loss_P.repeat_interleave(2), {"accuracy": right_P.repeat_interleave(2)}
