"""Picking in many rows at once, without a loop over rows."""
# N tokens, M picked tokens, B rows

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmpre.tokens import Tokens


def row_numbers(tokens: Tokens) -> Int[Tensor, "N"]:
    """The row of each token."""
    return _rows(tokens.lengths_B, len(tokens), tokens.special_N.device)


def _rows(lengths_B: Int[Tensor, "B"], size: int, device: torch.device) -> Int[Tensor, "N"]:
    if len(lengths_B) == 1:
        return torch.zeros(size, dtype=torch.int64, device=device)
    row_N = torch.repeat_interleave(torch.arange(len(lengths_B)), lengths_B, output_size=size)
    return row_N.to(device, non_blocking=True)


def one_row(who: str, tokens: Tokens) -> None:
    """Refuse a batch for a mask that works on rows."""
    if len(tokens.lengths_B) != 1:
        raise ValueError(
            f"{who}: works on one row in a loading worker, got a batch of {len(tokens.lengths_B)} rows; "
            "give it to a view as a pick"
        )


def lowest(key_N: Float[Tensor, "N"], lengths_B: Int[Tensor, "B"], counts_B: Int[Tensor, "B"]) -> Int[Tensor, "M"]:
    """The tokens with the lowest keys, `counts_B` of each row, sorted. Both counts lie on the CPU: no device is waited
    for."""
    order_N = key_N.argsort(stable=True)  # equal keys by their place, in a batch as in a row
    if len(lengths_B) == 1:
        return order_N[: int(counts_B)].sort().values
    order_N = order_N[_rows(lengths_B, len(key_N), key_N.device)[order_N].argsort(stable=True)]
    starts_B = lengths_B.cumsum(0) - lengths_B
    shift_B = starts_B - (counts_B.cumsum(0) - counts_B)
    place_M = torch.arange(int(counts_B.sum())) + torch.repeat_interleave(shift_B, counts_B)
    return order_N[place_M.to(key_N.device, non_blocking=True)].sort().values
