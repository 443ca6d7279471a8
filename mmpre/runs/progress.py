"""What a person sees of a run: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from mmpre.training.loop import Step

PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


class Progress:
    """Loss per task, what each pick took, tokens a second, the time left; one process of a run shows it."""

    def __init__(self, total: int, out: Path, *, quiet: bool = False) -> None:
        self.total, self.out, self.quiet = total, out, quiet
        self.console = Console(file=sys.stderr, markup=False)
        self.losses: dict[str, float] = {}
        self.picked: dict[str, float] = {}
        self.spoke = 0.0
        self.bar: Bar | None = None

    def __enter__(self) -> "Progress":
        if not self.quiet and self.console.is_terminal:
            self.bar = Bar(
                TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}", markup=False),
                TimeElapsedColumn(), TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self.task = self.bar.add_task(str(self.out), total=self.total, rate="")
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def step(self, done: int, one: Step, rate: float) -> None:
        before = self.losses.get(one.task, one.loss)
        if not one.skipped:  # its loss may be no number
            self.losses[one.task] = 0.9 * before + 0.1 * one.loss
        for name, share in one.picked.items():
            self.picked[name] = 0.9 * self.picked.get(name, share) + 0.1 * share
        if self.quiet:
            return
        text = " ".join(f"{name} {loss:.3f}" for name, loss in sorted(self.losses.items()))
        if self.picked:
            hidden = ", ".join(f"{name} {100 * share:.1f} %" for name, share in sorted(self.picked.items()))
            text += f"  picked {hidden}"
        if self.bar:
            self.bar.update(self.task, completed=done, description=text, rate=f"{rate:,.0f} tokens/s")
        elif time.monotonic() - self.spoke > PLAIN_SECONDS or done == self.total:
            self.spoke = time.monotonic()
            self.console.print(
                f"step {done}/{self.total}  {text}  {rate:,.0f} tokens/s", highlight=False, soft_wrap=True
            )

    def valid(self, done: int, loss: float, values: Mapping[str, Mapping[str, float]]) -> None:
        parts = [
            f"{task} " + " ".join(f"{name} {value:.3f}" for name, value in one.items()) for task, one in values.items()
        ]
        self.say(f"step {done}/{self.total}  held out {loss:.4f}  ({'; '.join(parts)})")

    def say(self, text: str) -> None:
        if text and not self.quiet:
            self.console.print(text, highlight=False, soft_wrap=True)
