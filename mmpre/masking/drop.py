"""The corruption that takes picked tokens away."""
# N tokens, n of them kept, M picked tokens, B rows

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from mmpre.draw import Draw
from mmpre.masking.protocol import Corrupted
from mmpre.tokens import Ragged, Tokens


@dataclass(frozen=True)
class Drop:
    """Take every picked token away, with its entry in every field; the others keep their order.

    Every field must have one entry a token: what a field of another length means without some tokens is not known
    here. Called on a batch that lies on a device it waits for the device once, to learn the new lengths.
    """

    def __call__(self, tokens: Tokens, index_M: Int[Tensor, "M"], draw: Draw) -> Corrupted:
        for name, one in tokens.fields.items():
            if one.refers_to or not torch.equal(one.lengths_B, tokens.lengths_B):
                raise ValueError(
                    f"Drop: every field needs one entry a token and no references, got {name!r} with "
                    f"{int(one.lengths_B.sum())} entries for {len(tokens)} tokens"
                    + (f", referring to {one.refers_to!r}" if one.refers_to else "")
                    + "; hide such tokens with HideAll instead, or write a corruption for this modality"
                )
        keep_N = torch.ones(len(tokens), dtype=torch.bool, device=index_M.device)
        keep_N[index_M] = False
        index_map = (keep_N.cumsum(0) - 1).masked_fill(~keep_N, -1)
        kept_n = keep_N.nonzero().squeeze(1)
        row_N = torch.repeat_interleave(torch.arange(len(tokens.lengths_B)), tokens.lengths_B)
        lengths_B = torch.bincount(row_N[kept_n.cpu()], minlength=len(tokens.lengths_B))
        fields = {name: Ragged(one.values[kept_n], lengths_B) for name, one in tokens.fields.items()}
        seen = Tokens(tokens.special_N[kept_n], lengths_B, fields)
        return Corrupted(seen, torch.zeros_like(kept_n, dtype=torch.bool), index_map)
