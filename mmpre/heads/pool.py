"""From the states of a row's tokens to one vector."""
# N tokens of the packed batch, B rows, D model width

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmpre.batch import Batch
from mmpre.network import Network


class First(nn.Module):
    """The state of a role's first token, such as [CLS]; the last layer computes no other."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role

    def forward(self, net: Network, batch: Batch) -> Float[Tensor, "B D"]:
        return net(batch, at=batch.layout.first(self.role))


class Mean(nn.Module):
    """The mean state of a role's tokens, special ones left out unless `special` says otherwise.

    A row without such a token is a ValueError on a CPU. Elsewhere its mean is not a number, which the guard against
    non-finite steps tells with the row's key: to look for it would hold up the device in every step.
    """

    def __init__(self, role: str, *, special: bool = False) -> None:
        super().__init__()
        self.role, self.special = role, special

    def forward(self, net: Network, batch: Batch) -> Float[Tensor, "B D"]:
        state_ND = net(batch, at=batch.layout.index[self.role])
        length_B = batch.layout.lengths[self.role].to(state_ND.device)
        counted_N1 = torch.ones_like(state_ND[:, :1])
        if not self.special:
            counted_N1 = counted_N1 * (batch.seen[self.role].special_N < 0)[:, None]
        sum_BD, count_B1 = (
            torch.segment_reduce(one, "sum", lengths=length_B, axis=0, unsafe=True)
            for one in (state_ND * counted_N1, counted_N1)
        )
        if count_B1.device.type == "cpu" and not count_B1.all():
            row = int((count_B1 == 0).nonzero()[0, 0])
            raise ValueError(f"Mean: row {batch.keys[row]!r} has no token of role {self.role!r} to take the mean of")
        return sum_BD / count_B1


class Tower(nn.Module):
    """A network, how its states become one vector a row, and what is done with that vector (a projector, or nothing).

    Towers may share a network: dropout still draws anew in each.
    """

    def __init__(self, net: Network, pool: nn.Module, project: nn.Module | None = None) -> None:
        super().__init__()
        self.net, self.pool, self.project = net, pool, project

    def forward(self, batch: Batch) -> Float[Tensor, "B D"]:
        x_BD = self.pool(self.net, batch)
        return x_BD if self.project is None else self.project(x_BD)
