"""Trains and resumes what a file lists, one after the other in one process group; started by torchrun."""

import json
import sys
from pathlib import Path

import torch

import mmpre
from mmpre.processes.processes import Processes
from mmpre.processes.stopping import end_at_once
from mmpre.runs.options import RunOptions


def carry_out(job):
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
        carry_out(job)
    processes.stop()


if __name__ == "__main__":
    end_at_once(carry_out_all)
