"""What an objective is: an nn.Module that turns a batch into a loss."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from mmpre.batch import Batch, Views
from mmpre.draw import Draw
from mmpre.modality import Reader
from mmpre.objectives.loss import Loss


class Objective(Protocol):
    """`readers` says, for every role of its batches, what tokenizes it; state changes only in `after_step`.

    A task with several views gives it `Views`, one batch a view.
    """

    readers: Mapping[str, Reader]

    def forward(self, batch: Batch | Views, draw: Draw) -> Loss: ...


@runtime_checkable
class InBatch(Protocol):
    """An objective whose rows are compared with each other (InfoNCE, queues), in two phases.

    `features` runs on each micro-batch; `loss` sees the features of all micro-batches of the step, concatenated in
    micro-batch order over all processes, so that any split gives the same gradient.
    """

    readers: Mapping[str, Reader]

    def features(self, batch: Batch | Views, draw: Draw) -> dict[str, Tensor]: ...

    def loss(self, features: Mapping[str, Tensor], counts: Sequence[int]) -> Loss: ...
