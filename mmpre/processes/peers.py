"""The processes of a run keep together: they begin alike, and the first error is what all of them tell."""

import hashlib
import json
import logging
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from mmpre.processes.processes import Processes

log = logging.getLogger(__name__)
CORE = Path(__file__).parent.parent
_WAIT_SECONDS = 3.0  # for the first cause of an error that came from another process


class PeerError(RuntimeError):
    """The processes of a run differ, or another one has failed first."""


def check_alike(processes: Processes, about: Mapping[str, Any]) -> None:
    """Refuse to begin where a named thing differs between processes. Raises PeerError on all of them."""
    told = processes.gather({name: json.dumps(one, sort_keys=True, default=str) for name, one in about.items()})
    for name, first in told[0].items():
        for rank, one in enumerate(told):
            if one[name] != first:
                raise PeerError(
                    f"the processes of this run differ in their {name}: rank 0 has {_cut(first)}, rank {rank} has "
                    f"{_cut(one[name])}; give every process the same command, packages, files and environment"
                )


def digest_of_code(folder: Path = CORE) -> str:
    """A digest of the core's source files."""
    digest = hashlib.blake2b(digest_size=12)
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def digest_of_weights(module: nn.Module) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for name, tensor in module.state_dict().items():
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()


@contextmanager
def first_cause(folder: Path, processes: Processes) -> Iterator[None]:
    """Write down the first error of any process in `<folder>/first-error.txt`; the others tell it as their reason.

    When one process fails, the others meet a broken connection. Whichever output a person reads, it names the cause.
    """
    path = folder / "first-error.txt"
    if processes.rank == 0:
        path.unlink(missing_ok=True)
    processes.barrier()
    try:
        yield
    except Exception as e:
        if processes.world == 1:
            raise
        if _from_another(e):
            raise PeerError(_told(path, processes.rank, e)) from None
        try:
            with path.open("x") as file:
                file.write(f"rank {processes.rank}: {type(e).__name__}: {e}\n\n{traceback.format_exc()}")
        except OSError:  # another one was first, or the disk refuses
            pass
        _tell_agent(e)
        raise


def _told(path: Path, rank: int, e: Exception) -> str:
    deadline = time.monotonic() + _WAIT_SECONDS
    while time.monotonic() < deadline:
        try:
            cause = path.read_text().split("\n\n")[0]
        except OSError:
            cause = ""
        if cause:
            return f"rank {rank} stopped because another process failed first. {cause}"
        time.sleep(0.05)
    return (
        f"rank {rank} stopped because another process ended without a word, as when it is killed or memory runs out "
        f"({str(e).splitlines()[0]}); the checkpoints are whole: go on with `mmpre resume`"
    )


def _from_another(e: Exception) -> bool:
    """A collective failed: the error came out of torch.distributed, and not from a check of its arguments."""
    if not isinstance(e, RuntimeError):
        return False
    frame: TracebackType | None = e.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__", "").startswith("torch.distributed"):
            return True
        frame = frame.tb_next
    return False


def _tell_agent(e: Exception) -> None:
    """torchrun prints at its end what it finds in this file."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(e)


def _cut(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."
