"""What a run's weights make of some rows. Each part finds by itself what the run's objectives and modalities offer."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmpre.data.remote import public
from mmpre.report import attention, predictions, retrieval, states, transport
from mmpre.report.opened import Opened, earlier, open_run

log = logging.getLogger(__name__)
Part = Callable[[Opened], Iterator[Any]]
OF_TASKS: tuple[Part, ...] = (predictions.panels, transport.panels, retrieval.of_tasks)
OF_NETWORK: tuple[Part, ...] = (retrieval.of_evaluations, states.panels, attention.panels)


def try_to_open(run: Path, data: Sequence[str], sidecar: str | None) -> tuple[Opened | None, list[str]]:
    """A run's network and rows; or None, and why: where data or weights are gone, a page is worth having without."""
    try:
        return open_run(run, data, sidecar), []
    except Exception as e:
        log.warning("%s: its network is not shown (%s)", run, e)
        return None, [f"what the network of {run} makes of rows: {_reason(e)}"]


def panels(
    opened: Opened, run: Path, data: Sequence[str] = (), sidecar: str | None = None
) -> tuple[str, list[Any], list[str]]:
    """What the rows are, the panels, and what had to be left out, with the reason.

    Tasks that only earlier stages have are shown behind those of the last one, on rows of their stage.
    """
    made, left_out = [], []

    def take(shown: Opened, parts: Sequence[Part], stage: int | None = None) -> None:
        for part in parts:
            try:
                for one in part(shown):
                    made.append(one if stage is None else replace(one, title=f"{one.title}, stage {stage}"))
            except Exception as e:  # a recipe's or modality's own code, of which a page must not depend
                name = part.__module__.rpartition(".")[2]
                log.warning("%s: %s is left out (%s)", run, name, e)
                left_out.append(f"{name} of {run}: {_reason(e)}")

    take(opened, OF_TASKS)
    for number, one in earlier(opened, data, sidecar):
        take(one, OF_TASKS, number)
    take(opened, OF_NETWORK)
    which = "held-out rows" if opened.held_out else "rows that it was trained on (it has no held-out ones)"
    return f"Weights of step {opened.step:,}, {which} of {' '.join(public(opened.urls))}.", made, left_out


def _reason(e: Exception) -> str:
    return f"{e}" if isinstance(e, ValueError | OSError) else f"{type(e).__name__}: {e}"
