"""`mmpre embed`: features of every row of some shards, by a run's network, in one file.

The file is put together from parts (parts.py), one after the other, and takes its name at the end: what it holds
does not depend on who made which part, nor on how often the work was interrupted.
"""

import logging
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from mmpre.embed.files import WRITERS, writer_of
from mmpre.embed.parts import Asked, EmbedError, Work
from mmpre.processes.stopping import die_with_parent

log = logging.getLogger(__name__)


def embed(
    run: Path | str, data: Sequence[str], out: Path | str, *, sidecar: str | None = None, layer: int | None = None,
    pool: str = "mean", roles: Sequence[str] = (), best: bool = False, batch: int = 32, processes: int | None = None,
    threads: int = 1, max_holes: float = 0.05,
) -> dict[str, Any]:  # fmt: skip
    """Write the features of every row of `data` to `out`, a .safetensors or .parquet file, and tell what was done.

    `pool` mean takes the mean state of each role's ordinary tokens, first its first token's ([CLS]), none keeps all
    tokens' states, tower takes what the recipe's towers make of each role, in the space that they share. A row is a
    window, or a whole sample where nothing cuts it. `layer` is counted as `Encoder` counts.
    `processes` are started here, by default one for each core or GPU; under torchrun each of its processes is one.
    The same settings give the same bytes, however many processes there are and however often they were killed;
    another `batch` or number of `threads` may change last bits.
    """
    out = Path(out)
    if out.suffix not in WRITERS:
        raise EmbedError(f"embed: {out} must end in {' or '.join(WRITERS)}, which says how it is written")
    asked = Asked(
        run=str(run), data=tuple(data), sidecar=sidecar, layer=layer, pool=pool, roles=tuple(roles), best=best,
        batch=batch, threads=threads, max_holes=max_holes,
    )  # fmt: skip
    under_agent = "RANK" in os.environ
    if processes is None:
        processes = 1 if under_agent else torch.cuda.device_count() or os.cpu_count() or 1
    if processes < 1:
        raise EmbedError(f"embed: processes must be at least 1, got {processes}")
    writer_of(out)  # refuses before any work where its package is missing
    if processes == 1 or under_agent:
        return _work(asked, out, int(os.environ.get("LOCAL_RANK", 0)))
    Work(asked, out).close()  # what is wrong is told once, and not by each process
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=die_with_parent) as pool_of:
        waiting = [pool_of.submit(_work, asked, out, rank) for rank in range(processes)]
        try:
            return [done.result() for done in as_completed(waiting)][-1]
        except BrokenProcessPool:
            raise EmbedError(
                f"embed: one of {processes} processes was killed (for want of memory?); what is made is kept: run it "
                "again, with fewer --processes or a smaller --batch"
            ) from None
        except Exception as e:  # told at once: to leave the pool is to wait for the others
            log.error("%s\nThe other processes go on, and what they make is kept.", e)
            raise


def _work(asked: Asked, out: Path, rank: int) -> dict[str, Any]:
    """What one process does: parts until there are none left, and the file if nobody else has made it."""
    before = torch.get_num_threads()
    torch.set_num_threads(asked.threads)
    work = Work(asked, out, rank)
    try:
        return work.told() if work.finished() else work.run()
    except FileNotFoundError:  # another process was done first and has tidied up
        if not work.finished():
            raise
        return work.told()
    finally:
        work.close()
        torch.set_num_threads(before)
