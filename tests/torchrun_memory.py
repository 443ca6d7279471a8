"""Trains what a file lists in one process group, and writes down what each process held; started by torchrun.

RUN-RANK.json gets the bytes of parameters, gradients and optimizer state after a step, of which of split tensors only
the own part counts, and the most that torch's allocator held at once.
"""

import json
import sys
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.profiler import ProfilerActivity, profile

import mmpre
from mmpre.processes.processes import Processes
from mmpre.processes.stopping import end_at_once
from mmpre.runs.options import RunOptions
from mmpre.training.gradients import local


def size(tensors):
    return sum(local(one).numel() * one.element_size() for one in tensors)


def peak(seen):
    now = most = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def train_all():
    torch.set_num_threads(1)
    processes, held = Processes.start(60.0), {}

    def look(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        states = [value for p in parameters for value in optimizer.state[p].values()]
        held.update(parameters=size(parameters), gradients=size(p.grad for p in parameters), moments=size(states))

    register_optimizer_step_post_hook(look)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        options = RunOptions(workers=0, **job["options"])
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
            mmpre.train(job["recipe"], scale=job["scale"], out=job["run"], options=options, **job["numbers"])
        Path(f"{job['run']}-{processes.rank}.json").write_text(json.dumps(held | {"peak": peak(seen)}))
    processes.stop()


if __name__ == "__main__":
    end_at_once(train_all)
