"""torch.compile, for the parts of a network that do the same whatever the batch's rows are.

Those are the maps that take each token by itself. Attention on a CPU calls one kernel for each run of rows of equal
length, so it would be compiled anew for every batch.
"""

from torch import nn

from mmpre.heads.transform import Transform
from mmpre.sublayers.feed_forward import FeedForward, GatedFeedForward


def compile_parts(module: nn.Module) -> None:
    """Compile feed-forwards and heads' transforms in place, for any number of tokens; the first step then waits for it.

    Dropout draws the same numbers as without, so losses differ by rounding alone.
    """
    from torch._inductor import config  # takes a second to import

    config.fallback_random = True
    for part in module.modules():
        if isinstance(part, FeedForward | GatedFeedForward | Transform):
            part.compile(dynamic=True)
