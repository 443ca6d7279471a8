"""The processes of a run: one alone, or those that torchrun started."""

import os
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib import import_module
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Number = TypeVar("Number", int, float)


class Processes:
    """What the training loop asks of the other processes; alone, every answer is its own.

    Under torchrun (RANK, WORLD_SIZE, LOCAL_RANK set) the group is made with nccl on CUDA and gloo elsewhere; one that
    the program has made itself is used, and left to it.
    """

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | str = "cpu", *, own: bool = False) -> None:
        self.rank, self.world, self.device, self.own = rank, world, torch.device(device), own

    @staticmethod
    def device_here() -> torch.device:
        """The device of this process's arithmetic."""
        local = int(os.environ.get("LOCAL_RANK", 0))
        return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")

    @staticmethod
    def start(timeout_seconds: float = 600.0) -> "Processes":
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        device = Processes.device_here()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        own = world > 1 and not dist.is_initialized()
        if own:
            # functions of this module take the group of the time of their import as a default, and torch imports it at
            # the first step of an optimizer: the group and its threads would then live past `stop`
            import_module("torch.distributed.nn.functional")

            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        return Processes(rank, world, device, own=own)

    def stop(self) -> None:
        """End the group, and with it the threads of its backend."""
        if self.own and dist.is_initialized():
            dist.destroy_process_group()

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag: is it set on any process?"""
        if self.world == 1:
            return list(flags)
        return (self.sum(torch.tensor(flags, dtype=torch.int64, device=self.device)) > 0).tolist()

    def all_agree(self, flag: bool) -> bool:
        return not self.any_of([not flag])[0]

    def sum_by_name(self, mine: Mapping[str, Number]) -> dict[str, Number]:
        """Add up counts, or numbers in float64, by name, in the order of the processes; one may lack a name."""
        if self.world == 1:
            return dict(mine)
        total: dict[str, Number] = {}
        for one in self.gather(dict(mine)):
            for name, value in one.items():
                total[name] = total[name] + value if name in total else value
        return total

    def gather(self, mine: object) -> list:
        """Every process's object, in the order of the processes (a small one: counts, names, error texts)."""
        if self.world == 1:
            return [mine]
        everyone: list = [None] * self.world
        dist.all_gather_object(everyone, mine)
        return everyone

    def gather_rows(self, mine: Tensor) -> list[Tensor]:
        """Every process's rows [n, ...], where n differs between processes; no gradient."""
        if self.world == 1:
            return [mine]
        sizes = [torch.zeros(1, dtype=torch.int64, device=mine.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(mine)], device=mine.device))
        longest = max(int(size) for size in sizes)
        padded = mine.new_zeros(longest, *mine.shape[1:])
        padded[: len(mine)] = mine
        everyone = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(everyone, padded)
        return [one[: int(size)] for one, size in zip(everyone, sizes, strict=True)]
