"""What a run's weights make of some rows. Each part finds by itself what the run's objectives and modalities offer."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mmpre.report import attention, predictions, retrieval, states, transport
from mmpre.report.opened import Opened, open_run

log = logging.getLogger(__name__)
PARTS: tuple[Callable[[Opened], Iterator[Any]], ...] = (
    predictions.panels, transport.panels, retrieval.panels, states.panels, attention.panels,
)  # fmt: skip


def try_to_open(run: Path, data: Sequence[str], sidecar: str | None) -> tuple[Opened | None, list[str]]:
    """A run's network and rows; or None, and why: where data or weights are gone, a page is worth having without."""
    try:
        return open_run(run, data, sidecar), []
    except Exception as e:
        log.warning("%s: its network is not shown (%s)", run, e)
        return None, [f"what the network of {run} makes of rows: {_reason(e)}"]


def panels(opened: Opened, run: Path) -> tuple[str, list[Any], list[str]]:
    """What the rows are, the panels, and what had to be left out, with the reason."""
    made, left_out = [], []
    for part in PARTS:
        try:
            made += part(opened)
        except Exception as e:  # a recipe's or modality's own code, of which a page must not depend
            name = part.__module__.rpartition(".")[2]
            log.warning("%s: %s is left out (%s)", run, name, e)
            left_out.append(f"{name} of {run}: {_reason(e)}")
    which = "held-out rows" if opened.held_out else "rows that it was trained on (it has no held-out ones)"
    return f"Weights of step {opened.step:,}, {which} of {' '.join(opened.urls)}.", made, left_out


def _reason(e: Exception) -> str:
    return f"{e}" if isinstance(e, ValueError | OSError) else f"{type(e).__name__}: {e}"
