"""Trains and resumes what a file lists, one after the other in one process group; started by torchrun."""

import json
import sys
from pathlib import Path

import torch

import mmpre
from mmpre.codes import Codebook
from mmpre.processes.processes import Processes
from mmpre.processes.stopping import end_at_once
from mmpre.runs.options import RunOptions
from mmpre.training.gradients import full, like
from mmpre.training.sharded import shard


def move_idle_codes(job, processes):
    """Steps in which codes 1 and 4 have no gradient, of a codebook that is shared out where there are two processes."""
    torch.manual_seed(0)
    book, gradient_KC = Codebook(6, 4, patience=2), torch.ones(6, 4)
    gradient_KC[[1, 4]] = 0
    if processes.world > 1:
        shard(book, processes)
    for step in range(3):
        book.vector_KC.grad = like(gradient_KC, book.vector_KC)
        book.after_step(step)
    vectors_KC = full({"vectors": book.vector_KC})["vectors"].detach()
    if processes.rank == 0:
        torch.save({"vectors": vectors_KC, "idle": book.idle_K}, job["run"])


def carry_out(job, processes=None):
    if job["do"] == "codes":
        return move_idle_codes(job, processes or Processes())
    options = RunOptions(workers=0, log_every=1, **job.get("options", {}))
    if job["do"] == "resume":
        return mmpre.resume(job["run"], workers=0, **job.get("options", {}))
    return mmpre.train(
        Path(__file__).with_name(f"{job['recipe']}.py"), out=job["run"], options=options, **job["numbers"]
    )


def carry_out_all():
    torch.set_num_threads(1)
    processes = Processes.start(60.0)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        carry_out(job, processes)
    processes.stop()


if __name__ == "__main__":
    end_at_once(carry_out_all)
