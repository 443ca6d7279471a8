"""Trains and resumes what a file lists, one after the other in one process group; started by torchrun.

Ends badly where threads of the group outlive it: one that lets go of a tensor while the interpreter ends takes the
process down.
"""

import json
import os
import sys
from pathlib import Path

import torch

import mmpre
from mmpre.options import RunOptions
from mmpre.processes import Processes


def carry_out(job):
    options = RunOptions(workers=0, log_every=1, **job.get("options", {}))
    if job["do"] == "resume":
        return mmpre.resume(job["run"], workers=0, **job.get("options", {}))
    return mmpre.train(
        Path(__file__).with_name(f"{job['recipe']}.py"), out=job["run"], options=options, **job["numbers"]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    before = len(os.listdir("/proc/self/task"))
    processes = Processes.start(60.0)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        carry_out(job)
    processes.stop()
    more = len(os.listdir("/proc/self/task")) - before
    sys.exit(f"{more} threads of the group are left" if more else 0)
