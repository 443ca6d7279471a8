"""Which of the ways to add up gradients (gradients.py, sharded.py) a run takes."""

from mmpre.processes.processes import Processes
from mmpre.training.gradients import Gradients, Overlapped, Root, Summed


def choose(kind: str, root: Root, processes: Processes, *, exact: bool) -> Gradients:
    """The way that `RunOptions.parallel` names, for the parameters that are trained now."""
    if kind == "auto":
        # DDP's gain is to hide the sum behind the backward pass. gloo adds up on the cores that compute, so on a CPU
        # there is little to hide behind, and one flat sum at the end is as quick without stand-ins and without a search
        # for unused parameters. Measured with 4.7 million parameters, 2 processes on 2 busy cores, a step's median of
        # 30: no sum 660 ms, DDP 713, one flat sum 735, a sum for each parameter 876.
        kind = "ddp" if processes.device.type == "cuda" and not exact else "sum"
    if kind == "fsdp" and processes.world > 1:
        from mmpre.training.sharded import Sharded  # takes half a second to import

        return Sharded(root, processes)
    if kind == "ddp" and processes.world > 1:
        return Overlapped(root, processes)
    return Summed([p for p in root.parameters() if p.requires_grad], processes, exact=exact)
