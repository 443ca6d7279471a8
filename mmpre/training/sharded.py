"""Parameters, gradients and optimizer state shared out over the processes, by FSDP2 (`fully_shard`)."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from mmpre.blocks import Encoder
from mmpre.processes.processes import Processes
from mmpre.training.gradients import Root, is_split, sum_flat


class Sharded:
    """Every forward pass gathers parameters from all processes, so all of them run the same number of parts, and what a
    task computes may depend on the step but not on the rows."""

    together = True

    def __init__(self, root: Root, processes: Processes) -> None:
        self.root, self.processes = root, processes
        if not isinstance(root, FSDPModule):
            shard(root, processes)

    def run(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return self.root(call, *arguments)

    def parts(self, numbers: Sequence[int], rank: int) -> int:
        return max(numbers)

    @contextmanager
    def part(self, *, last: bool):
        self.root.set_requires_gradient_sync(last)
        yield

    def add(self) -> None:
        pass

    def finish(self) -> None:
        # what fully_shard cannot split (single numbers, such as a temperature) is whole on every process
        whole = [p for p in self.root.parameters() if p.requires_grad and not is_split(p)]
        have = self.processes.any_of([p.grad is not None for p in whole])
        sum_flat([p for p, one in zip(whole, have, strict=True) if one], self.processes)


def shard(root: Root, processes: Processes) -> None:
    """Share the parameters out over the processes: each encoder block by itself, all others together.

    A block that shares a parameter with something outside stays with the others, for a parameter has one owner.
    """
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    single = {p for p in root.parameters() if p.ndim == 0}
    for block in blocks_alone(root):
        fully_shard(block, mesh=mesh, ignored_params=single)
    fully_shard(root, mesh=mesh, ignored_params=single)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # neither gloo nor a factor of 1 needs NCCL's own operations


def blocks_alone(root: nn.Module) -> list[nn.Module]:
    """The encoder blocks that are gathered by themselves: those that share no parameter with what is outside."""
    owners: dict[nn.Parameter, int] = {}
    for module in root.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[parameter] = owners.get(parameter, 0) + 1
    blocks = dict.fromkeys(block for m in root.modules() if isinstance(m, Encoder) for block in m.blocks)
    return [block for block in blocks if all(_uses(block, one) == owners[one] for one in block.parameters())]


def _uses(block: nn.Module, parameter: nn.Parameter) -> int:
    return sum(parameter is one for module in block.modules() for one in module._parameters.values())
