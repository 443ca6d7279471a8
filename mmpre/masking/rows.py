"""Picking in many rows at once, without a loop over rows."""
# N tokens, M picked tokens, B rows

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmpre.tokens import Tokens


def row_numbers(tokens: Tokens) -> Int[Tensor, "N"]:
    """The row of each token."""
    rows, device = len(tokens.lengths_B), tokens.special_N.device
    if rows == 1:
        return torch.zeros(len(tokens), dtype=torch.int64, device=device)
    row_N = torch.repeat_interleave(torch.arange(rows), tokens.lengths_B, output_size=len(tokens))
    return row_N.to(device, non_blocking=True)


def one_row(who: str, tokens: Tokens) -> None:
    """Refuse a batch for a mask that works on rows."""
    if len(tokens.lengths_B) != 1:
        raise ValueError(
            f"{who}: works on one row in a loading worker, got a batch of {len(tokens.lengths_B)} rows; "
            "give it to a view as a pick"
        )


def lowest(key_N: Float[Tensor, "N"], tokens: Tokens, counts_B: Int[Tensor, "B"]) -> Int[Tensor, "M"]:
    """The tokens with the lowest keys, `counts_B` (on the CPU) of each row, sorted; waits for no device."""
    order_N = key_N.argsort()
    if len(counts_B) > 1:
        order_N = order_N[row_numbers(tokens)[order_N].argsort(stable=True)]
    starts_B = tokens.lengths_B.cumsum(0) - tokens.lengths_B
    shift_B = starts_B - (counts_B.cumsum(0) - counts_B)
    place_M = torch.arange(int(counts_B.sum())) + torch.repeat_interleave(shift_B, counts_B)
    return order_N[place_M.to(key_N.device, non_blocking=True)].sort().values
