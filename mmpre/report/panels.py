"""What a run's weights make of some rows. Each part finds by itself what the run's objectives and modalities offer."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

from mmpre.report import attention, predictions, states, transport
from mmpre.report.account import Account
from mmpre.report.opened import Opened, open_run

log = logging.getLogger(__name__)
PARTS: tuple[Callable[[Opened], Iterator[Any]], ...] = (
    predictions.panels, transport.panels, states.panels, attention.panels,
)  # fmt: skip


def panels(account: Account) -> tuple[str, list[Any], list[str]]:
    """What the rows are, the panels, and what had to be left out, with the reason.

    A page is worth having without them: data may have moved, weights may be gone.
    """
    try:
        opened = open_run(account.path)
    except Exception as e:
        log.warning("%s: its network is not shown (%s)", account.path, e)
        return "", [], [f"what the network of {account.path} makes of rows: {_reason(e)}"]
    made, left_out = [], []
    for part in PARTS:
        try:
            made += part(opened)
        except Exception as e:  # a recipe's or modality's own code, of which a page must not depend
            name = part.__module__.rpartition(".")[2]
            log.warning("%s: %s is left out (%s)", account.path, name, e)
            left_out.append(f"{name} of {account.path}: {_reason(e)}")
    which = "held-out rows" if opened.held_out else "rows that it was trained on (it has no held-out ones)"
    return f"Weights of step {opened.step:,}, {which} of {' '.join(opened.urls)}.", made, left_out


def _reason(e: Exception) -> str:
    return f"{e}" if isinstance(e, ValueError | OSError) else f"{type(e).__name__}: {e}"
