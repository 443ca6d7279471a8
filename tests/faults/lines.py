"""The lines of the scoreboard: what each figure is, and the functions that take them.

A function in a file `lines_<theme>.py` takes a line: it gets an empty folder and returns a Figure. It is registered by
`@line("S14")`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Line:
    """What a figure is, the target it has to meet, and whether missing it makes the board red."""

    title: str
    target: str
    hard: bool = True


@dataclass(frozen=True)
class Figure:
    """What was measured, as the table shows it, whether the target is met, and the numbers behind it (as JSON)."""

    shown: str
    good: bool
    numbers: Mapping[str, Any] = field(default_factory=dict)


Take = Callable[[Path], Figure]
LINES = {
    "S1": Line("kill -9 at 20 random steps, shape redrawn each time: lines that differ / same weights", "0 / yes"),
    "S2": Line("processes {1, 2, 4} x workers {0, 1, 2, 3}: bit-identical / same global batches", "12/12; 12/12"),
    "S3": Line("samples lost / doubled in an epoch, over 3 epochs and 5 resumes", "0 / 0"),
    "S4": Line("time to the first batch at step 1,000,000 against step 0", "ratio < 1.2 or < 50 ms more"),
    "S5": Line("bytes of data state in a checkpoint, small and 100 times larger data", "< 4 kB, constant"),
    "S6": Line("damage of shards: found / false pairs / healthy samples lost", "100 % / 0 / 0"),
    "S7": Line("planned = trained + holes, alike in all shapes", "exact"),
    "S8": Line("faults of loading workers that end an epoch without an error", "0"),
    "S9": Line("faults after which a run has not ended within twice the watchdog's limit", "0"),
    "S10": Line("seconds past the limit until a frozen process is named with rank, step and phase", "< 10 s"),
    "S11": Line("mutants of inputs: tracebacks / segfaults / > 2 s / > 300 MB", "0 / 0 / 0 / 0"),
    "S12": Line("mutants of media: runs ended / memory over budget", "0 / 0"),
    "S13": Line("code-execution probes: markers found", "0"),
    "S14": Line("checkpoints: flipped bits found, 100 places in every file", "100 %"),
    "S15": Line("save on a full disk: checkpoint before it loads / run survives", "yes / yes"),
    "S16": Line("seconds that training stands for a save of 200 MB", "< 1.0 s", hard=False),
    "S17": Line("share of checksums in reading and decoding pictures", "< 3 %", hard=False),
    "S18": Line("exact mode against fast mode, time of a step", "< 15 % more", hard=False),
    "S19": Line("SIGTERM: saved and ended clean, over all phases", "100 %"),
    "S20": Line("steps skipped for each injected NaN / processes that agree", "1.0 / 100 %"),
    "S21": Line("index: members a second / bytes a member", "> 15,000 / < 64", hard=False),
    "S22": Line("memory growth over 20,000 samples / descriptors / processes and shared memory left", "~0 / 0 / 0"),
    "S23": Line("export against checkpoint: largest difference of tensors / of results", "0 / rounding"),
    "S24": Line("faults whose error names what is broken and the way out", ">= 95 %", hard=False),
    # for comparison: the same faults on what people use today
    "V1": Line("webdataset, damage as in S6: found / false pairs / healthy samples lost", "for comparison", hard=False),
    "V2": Line("torchdata's StatefulDataLoader, resumed with other workers: samples", "for comparison", hard=False),
    "V3": Line("flipped bits found on load: torch.save, DCP, safetensors", "for comparison", hard=False),
    "V4": Line("full disk: the checkpoint before, of torch.save, DCP, safetensors", "for comparison", hard=False),
}
TAKES: dict[str, Take] = {}


def line(name: str) -> Callable[[Take], Take]:
    """Register the function that takes a line."""

    def register(take: Take) -> Take:
        if name not in LINES or name in TAKES:
            raise ValueError(f"line {name} is {'taken already' if name in LINES else 'not on the board'}")
        TAKES[name] = take
        return take

    return register
