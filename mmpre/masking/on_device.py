"""Masking a batch again where it lies, in an objective: by a model's scores, or with what a model has sampled."""
# N tokens, M picked tokens

from dataclasses import replace

from jaxtyping import Int
from torch import Tensor

from mmpre.batch import Batch, Picked
from mmpre.draw import Draw
from mmpre.masking.protocol import Corruption


def hide(batch: Batch, pick: str, role: str, index_M: Int[Tensor, "M"], corruption: Corruption, draw: Draw) -> Batch:
    """The batch with the picked tokens of a role hidden in place of what was hidden before; other roles stay.

    The new pick is called `pick`, other picks of the role go. The batch's counts are the workers' still: a loss over
    the new pick says by what it is divided. Raises ValueError where the corruption moves tokens: the layout is made.
    The share that was really picked is worth logging, as a metric of the loss: (torch.tensor(len(index_M)), "tokens").
    VIOLET (attended masking) and MergeDNA (adaptive masking) mask by what the network itself says of the clean batch;
    ELECTRA's discriminator reads a batch in which `Show` puts what the generator has sampled.
    """
    made = corruption(batch.clean[role], index_M, draw)
    if made.index_map is not None:
        raise ValueError(f"hide: {type(corruption).__name__} moves tokens, but the batch's layout stays; use HideAll")
    others = {name: one for name, one in batch.picked.items() if one.role != role}
    return replace(
        batch,
        seen={**batch.seen, role: made.tokens},
        replaced={**batch.replaced, role: made.replaced_N},
        picked={**others, pick: Picked(role, index_M, index_M)},
    )
