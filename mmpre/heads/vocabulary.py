"""Predict the id of a picked token."""
# M picked tokens, D model width, V ids

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmpre.heads.cross_entropy import cross_entropy
from mmpre.heads.guess import Choice
from mmpre.heads.transform import Transform
from mmpre.tokens import Tokens


class Vocabulary(nn.Module):
    """Dense, GELU, LayerNorm, then the embedding table as decoder, with a bias of its own (Devlin et al. 2018).

    States come gathered: the decoder runs on picked tokens only. `width` is theirs, where the table has another one;
    `transform`, where given, stands in place of what comes before the table. `z` is the weight of the squared logarithm
    of the scores' summed exponentials, which is added to keep scores from growing.
    """

    def __init__(
        self, tie: nn.Embedding, *, width: int | None = None, field: str = "ids", eps: float = 1e-12,
        transform: nn.Module | None = None, z: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.field = field
        plain = transform is None
        self.transform = Transform(width or tie.embedding_dim, tie.embedding_dim, eps=eps) if plain else transform
        self.z = z
        self.table = tie
        self.bias = nn.Parameter(torch.zeros(tie.num_embeddings))

    @classmethod
    def untied(cls, width: int, ids: int, *, field: str) -> "Vocabulary":
        """With a table of its own, for ids that nothing embeds, such as codes of pictures (BEiT, arXiv:2106.08254)."""
        table = nn.Embedding(ids, width)
        nn.init.normal_(table.weight, std=0.02)
        return cls(table, field=field)

    def scores(self, state_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M V"]:
        return F.linear(self.transform(state_MD), self.table.weight, self.bias)

    def forward(self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
        return self.loss(self.scores(state_MD), tokens[self.field][index_M])

    def loss(self, score_MV: Float[Tensor, "M V"], id_M: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
        """What scores cost where these are the true ids."""
        loss_M = cross_entropy(score_MV, id_M)
        return loss_M + self.z * score_MV.float().logsumexp(1).square() if self.z else loss_M

    def measured(
        self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]
    ) -> tuple[Float[Tensor, "M"], Mapping[str, Float[Tensor, "M"]]]:
        scores_MV, id_M = self.scores(state_MD), tokens[self.field][index_M]
        right_M = scores_MV.detach().max(1).indices == id_M  # argmax takes three times as long on a CPU
        return self.loss(scores_MV, id_M), {"accuracy": right_M.float()}

    def guess(self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]) -> Choice:
        return Choice.of(self.field, self.scores(state_MD), tokens[self.field][index_M])
