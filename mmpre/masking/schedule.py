"""Shares of tokens that stay as they are or change with the step."""

from collections.abc import Callable
from dataclasses import dataclass

Share = float | Callable[[int], float]  # a share of the tokens, or what gives it for a step; picklable


@dataclass(frozen=True)
class Line:
    """A share that goes in a straight line from `start` at step 0 to `end` at step `steps`, and then stays.

    GPT-BERT (Charpentier & Samuel 2024, arXiv:2410.24159) hides 30 percent at first and 15 in the end.
    """

    start: float
    end: float
    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"Line: steps must be at least 1, got {self.steps}")
        check_share("Line", "start", self.start)
        check_share("Line", "end", self.end)

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(1.0, step / self.steps)


def check_share(who: str, name: str, share: Share) -> None:
    """Refuse a fixed share outside of (0, 1)."""
    if not callable(share) and not 0 < share < 1:
        raise ValueError(f"{who}: {name} must lie between 0 and 1, got {share}; 15 percent is 0.15")


def share_at(who: str, name: str, share: Share, step: int) -> float:
    """The share at a step. Raises ValueError where a schedule leaves (0, 1)."""
    if not callable(share):
        return share
    value = share(step)
    check_share(f"{who} at step {step}", name, value)
    return value
