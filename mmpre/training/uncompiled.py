"""torch's AdamW, without the import of torch's compiler that its optimizers make only to tell it to look away.

No optimizer is compiled here, and that import takes a fifth of the time to a run's first step.
"""

import inspect
from collections.abc import Iterable

import torch

_STEP = inspect.unwrap(torch.optim.AdamW.step)


class FusedAdamW(torch.optim.AdamW):
    """torch.optim.AdamW in one kernel; the same numbers and the same state."""

    def __init__(self, groups: Iterable[dict], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        spare_compiler()
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        _STEP(self)


def spare_compiler() -> None:
    """Mark what torch hides of an optimizer from its compiler as hidden; a torch that has no such marks is left alone.

    Source: torch/_compile.py, which looks the mark up before it imports the compiler to set it.
    """
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if method is not None:
            method.__dict__.setdefault("__dynamo_disable", method)
