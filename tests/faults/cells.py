"""Many small runs in one set of processes, whose start is paid once: `python cells.py CELLS.json`, also under torchrun.

The file lists runs: {"recipe", "out", "options", "numbers"}. Beside each run stands `<out>.given` (see recording.py).
"""

import json
import os
import sys
from pathlib import Path

import recording
import torch.distributed as dist

import mmpre
from mmpre.processes.processes import Processes
from mmpre.runs.options import RunOptions
from mmpre.training import loop


def main(cells: list[dict]) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
        Processes.stop = Processes.barrier  # the group serves all runs
    step_counts = loop.step_counts
    for cell in cells:
        loop.step_counts = step_counts
        recording.record(Path(f"{cell['out']}.given"))
        numbers = {name: tuple(value) if isinstance(value, list) else value for name, value in cell["numbers"].items()}
        mmpre.train(cell["recipe"], out=cell["out"], options=RunOptions(**cell["options"]), **numbers)
        print("done", cell["out"], flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
