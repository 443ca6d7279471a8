"""What a head is: an nn.Module that says how far states are from what was picked."""
# M picked tokens, D model width

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from mmpre.tokens import Tokens


@runtime_checkable
class Head(Protocol):
    """`tokens` are the clean ones; `index_M` are the picked tokens' numbers among them."""

    def forward(
        self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]
    ) -> Float[Tensor, "M"]: ...

    def measured(
        self, state_MD: Float[Tensor, "M D"], tokens: Tokens, index_M: Int[Tensor, "M"]
    ) -> tuple[Float[Tensor, "M"], Mapping[str, Float[Tensor, "M"]]]:
        """The losses, and by name what else is worth logging of each token, such as whether it was right."""
        ...
