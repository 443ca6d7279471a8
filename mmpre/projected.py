"""A modality in a network of another width."""
# N tokens of the packed batch, E values of a token's clean features, D model width

from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmpre.modality import Modality, Reader
from mmpre.tokens import Tokens


class Projected(nn.Module):
    """What a modality embeds, mapped from its width to the network's.

    So a large table of words may be narrower than the states, or serve two networks of different widths, each with a
    projection of its own. Source: ALBERT (Lan et al. 2019, arXiv:1909.11942), ELECTRA (arXiv:2003.10555).
    """

    def __init__(self, modality: Modality, width: int, out: int) -> None:
        super().__init__()
        self.modality = modality
        self.project = nn.Linear(width, out)
        nn.init.normal_(self.project.weight, std=0.02)
        nn.init.zeros_(self.project.bias)

    @property
    def reader(self) -> Reader:
        return self.modality.reader

    def features(self, tokens: Tokens) -> Float[Tensor, "N E"]:
        return self.modality.features(tokens)

    def embed(self, f_NE: Float[Tensor, "N E"], tokens: Tokens, replaced_N: Bool[Tensor, "N"]) -> Float[Tensor, "N D"]:
        x_ND = self.modality.embed(f_NE, tokens, replaced_N)
        return self.project(x_ND).to(x_ND.dtype)  # under autocast the states keep their precision
