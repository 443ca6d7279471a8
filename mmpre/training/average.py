"""An exponential moving average of a network's weights: a teacher, or the network to keep."""

import copy
from typing import Any

import torch
from torch import nn

from mmpre.schedules import Ramp


class Average(nn.Module):
    """A copy of `source` whose weights follow it: after each step, decay * own + (1 - decay) * source's.

    Called like its source, without gradients and without dropout. Put it into an objective (a teacher) or into the
    recipe's `modules`: the training loop finds it there and updates it once after every step that was not skipped, a
    checkpoint holds it. `decay` is a number or a ramp over the stage's steps. Buffers are copied.
    Source: Polyak & Juditsky 1992; as a teacher, Tarvainen & Valpola 2017, arXiv:1703.01780.
    """

    def __init__(self, source: nn.Module, decay: float | Ramp) -> None:
        super().__init__()
        if not isinstance(decay, Ramp) and not 0 <= decay <= 1:
            raise ValueError(f"Average: decay must lie between 0 and 1 (or be a ramp), got {decay}; 0.999 is usual")
        self.module = copy.deepcopy(source).requires_grad_(False).eval()
        self.decay = decay
        self._source = (source,)  # in a tuple, so that it is no submodule: its weights are kept where it lives

    @torch.no_grad()
    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.module(*arguments, **named)

    def train(self, mode: bool = True) -> "Average":
        """It stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the source, after the step was made."""
        decay = self.decay.at(step) if isinstance(self.decay, Ramp) else self.decay
        for own, other in zip(self.module.parameters(), self._source[0].parameters(), strict=True):
            own.lerp_(other, 1 - decay)
        self._copy_buffers()

    @torch.no_grad()
    def restart(self) -> None:
        """Be what the source is now."""
        for own, other in zip(self.module.parameters(), self._source[0].parameters(), strict=True):
            own.copy_(other)
        self._copy_buffers()

    def _copy_buffers(self) -> None:
        for own, other in zip(self.module.buffers(), self._source[0].buffers(), strict=True):
            own.copy_(other)


def averages(module: nn.Module) -> list[Average]:
    """All averages in a module."""
    return [one for one in module.modules() if isinstance(one, Average)]
