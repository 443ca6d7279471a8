"""Who adds up a step's gradients, over this process's micro-batches and over all processes.

Losses are divided by counts over the whole step, so gradients are summed, never averaged: means that torch's wrappers
take are undone. All three ways leave the step's gradient in `.grad` of every parameter that got one on any process,
and None on the others, which the optimizer then leaves alone.

Summed      plain backward passes; one sum over processes at the step's end. Exact mode adds in float64 and rounds once
Overlapped  DistributedDataParallel: sums travel while the last backward pass still runs
Sharded     FSDP2 (`fully_shard`, sharded.py): parameters, gradients and optimizer state are shared out
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mmpre.processes.processes import Processes


class Root(nn.Module):
    """Everything with parameters, run by calls of an objective; torch's wrappers act on its `forward`.

    A call's result must show them every tensor that is differentiated: tensors in tuples and dicts, nothing else.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return call(*arguments)


class Gradients(Protocol):
    together: bool  # whether processes meet within the passes that run now

    def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call an objective."""
        ...

    def parts(self, numbers: Sequence[int], rank: int) -> int:
        """How many parts a process must run where the processes have `numbers` of them; the rest are stand-ins."""
        ...

    def part(self, *, last: bool) -> AbstractContextManager:
        """Encloses the forward and backward pass of a part; `last` for this process's last one of the step."""
        ...

    def add(self) -> None:
        """Take over what the last backward pass left; call it once after each."""
        ...

    def finish(self) -> None:
        """Leave the step's gradient in `.grad`."""
        ...


class Summed:
    """Exact: each micro-batch's gradient is added in float64 and rounded once, so that neither the split over processes
    nor the order of addition changes a bit. Fast: torch adds them up in place and one flat sum joins the processes."""

    together = False

    def __init__(self, parameters: Sequence[nn.Parameter], processes: Processes, *, exact: bool) -> None:
        self.parameters, self.processes, self.exact = list(parameters), processes, exact
        self.sums: dict[int, Tensor] = {}

    def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return call(*arguments)

    def parts(self, numbers: Sequence[int], rank: int) -> int:
        return numbers[rank]

    def part(self, *, last: bool) -> AbstractContextManager:
        return nullcontext()

    def add(self) -> None:
        if not self.exact:
            return
        for i, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                continue
            if i not in self.sums:
                self.sums[i] = parameter.grad  # as it is: what is alone needs no rounding
            else:
                self.sums[i] = self.sums[i].double().add_(parameter.grad)
            parameter.grad = None

    def finish(self) -> None:
        have = self.processes.any_of([i in self.sums or p.grad is not None for i, p in enumerate(self.parameters)])
        trained = [(i, p) for i, p in enumerate(self.parameters) if have[i]]
        if self.exact:
            for i, parameter in trained:
                mine = self.sums.get(i)
                mine = torch.zeros_like(parameter) if mine is None else mine
                if self.processes.world > 1:
                    mine = self.processes.sum(mine.double())
                parameter.grad = mine.to(parameter.dtype)
            self.sums.clear()
        elif self.processes.world > 1:
            sum_flat([parameter for _, parameter in trained], self.processes)


class Overlapped:
    """One DistributedDataParallel over all tasks. Tasks leave heads unused and rows of one process may lack what others
    have, so unused parameters are looked for in each step."""

    def __init__(self, root: Root, processes: Processes) -> None:
        self.parameters = [p for p in root.parameters() if p.requires_grad]
        # where every parameter happens to be used DDP would print a warning; one that never is keeps it quiet
        root.register_parameter("unused", nn.Parameter(torch.zeros(1, device=processes.device)))
        self.world = processes.world
        self.wrapped = DistributedDataParallel(root, broadcast_buffers=False, find_unused_parameters=True)

    @property
    def together(self) -> bool:
        return torch.is_grad_enabled()

    def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return self.wrapped(call, *arguments) if self.together else call(*arguments)

    def parts(self, numbers: Sequence[int], rank: int) -> int:
        return max(numbers[rank], min(1, max(numbers)))  # each process takes part in the sum, where there is one

    def part(self, *, last: bool) -> AbstractContextManager:
        return nullcontext() if last else self.wrapped.no_sync()

    def add(self) -> None:
        pass

    def finish(self) -> None:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, self.world)  # DDP has taken the mean


def sum_flat(parameters: Sequence[nn.Parameter], processes: Processes) -> None:
    """Sum `.grad` over all processes in one flat all-reduce; None counts as zeros."""
    if not parameters or processes.world == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = processes.sum(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(total.view_as(parameter))


def total_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """The norm of the whole gradient, of parts that other processes hold too."""
    grads = [p.grad for p in parameters if p.grad is not None]
    split = [grad for grad in grads if is_split(grad)]
    whole = torch.nn.utils.get_total_norm([grad for grad in grads if not is_split(grad)])
    if not split:
        return whole
    norm = torch.nn.utils.get_total_norm(split).full_tensor()
    return torch.linalg.vector_norm(torch.stack([norm, whole.to(norm.device)]))


def is_split(tensor: Tensor) -> bool:
    """Whether other processes hold the rest of a tensor (FSDP2's DTensor)."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if is_split(tensor) else tensor


def full(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with all their parts, where two names of one tensor stay so; every process must ask for them."""
    whole = {id(tensor): tensor.full_tensor() if is_split(tensor) else tensor for tensor in tensors.values()}
    return {name: whole[id(tensor)] for name, tensor in tensors.items()}


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """A tensor, split as a parameter is."""
    value = value.to(parameter.device)
    if is_split(value) or not is_split(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
