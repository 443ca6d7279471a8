"""Single vectors of a table."""
# D width of a table's vectors

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def vector(table: nn.Embedding, i: int) -> Float[Tensor, "D"]:
    """The i-th vector, such as that of the mask token.

    Its gradient is sparse, so that it costs next to nothing to add to that of the tokens' lookup; `table.weight[i]`
    would make zeros of the table's size and add them in every step. On the meta device, where sparse gradients cannot
    be added, it has none: a plan would count next to nothing for it.
    """
    if table.weight.is_meta:
        return table.weight.detach()[i]
    index = table.weight.new_full((), i, dtype=torch.int64)
    return F.embedding(index, table.weight, sparse=True)
