"""Lines of the scoreboard about processes: what ends in silence, what hangs, what a signal does, what is left."""

import functools
import os
import resource
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from cases import BROKEN
from harness import lines, newest, step_of
from lines import Figure, line
from runs import start, train

from mmpre.data.loader import MicroBatches, load, slots
from mmpre.plugins import find_recipe
from mmpre.runs import checkpoint
from mmpre.runs.run import open_units

LIMIT = 6.0  # of the watchdog
FAULTS = {  # what breaks at step 6 (with how many processes and workers)
    "worker-killed": (1, 1), "worker-exits": (1, 2), "worker-leaves": (1, 2), "unpicklable": (1, 2),
    "worker-stopped": (1, 2), "worker-sleeps": (1, 1), "killed": (2, 0), "raise": (2, 0), "stopped": (2, 0),
    "hangs": (2, 0), "other-path": (2, 0),
}  # fmt: skip
WORKERS = ("worker-killed", "worker-exits", "worker-leaves", "unpicklable", "worker-stopped")


@dataclass(frozen=True)
class Outcome:
    """How a broken run ended: its code, seconds after the break, what it printed and the watchdogs' notes."""

    code: int | None
    seconds: float
    output: str
    notes: str
    noted: float | None


@functools.cache
def outcomes() -> dict[str, Outcome]:
    """Break a run in every way."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        shards = BROKEN.make(folder / "shards")
        for fault, (processes, workers) in FAULTS.items():
            run = folder / fault
            breaks = f"{fault}@6" + ("/1" if processes > 1 else "")
            words = ("--hang-seconds", LIMIT)
            with start(run, shards, *words, breaks=breaks, processes=processes, workers=workers) as tree:
                tree.until(lambda run=run: step_of(run) >= 5, seconds=120)
                begun, code = time.monotonic(), None
                while time.monotonic() < begun + 4 * LIMIT and (code := tree.process.poll()) is None:
                    time.sleep(0.02)
                wall = (run / "metrics.jsonl").stat().st_mtime  # the last step that was done: since then it is broken
                seconds = time.time() - wall
                notes = sorted(run.glob("hang-*"), key=lambda path: path.stat().st_mtime)
                noted = notes[0].stat().st_mtime - wall if notes else None
                told = "".join(path.read_text() for path in notes)
                found[fault] = Outcome(code, seconds, tree.output, told, noted)
    return found


@line("S8")
def silent_endings(folder: Path) -> Figure:
    """A worker that is killed, exits with 0, raises SystemExit or what cannot be pickled, or is frozen."""
    found = {name: outcomes()[name] for name in WORKERS}
    silent = [name for name, one in found.items() if one.code == 0 or "step 6" not in one.output]
    numbers = {name: {"code": one.code, "seconds": round(one.seconds, 1)} for name, one in found.items()}
    return Figure(f"{len(silent)} of {len(found)}", not silent, numbers | {"silent": silent})


@line("S9")
def hangs(folder: Path) -> Figure:
    """All of FAULTS, each given twice the watchdog's limit to end in."""
    late = [name for name, one in outcomes().items() if one.code is None or one.seconds > 2 * LIMIT]
    numbers = {name: round(one.seconds, 1) for name, one in outcomes().items()}
    longest = max(numbers.values())
    return Figure(f"{len(late)} of {len(numbers)} (longest {longest:.1f} s of {2 * LIMIT:g})", not late, numbers)


@line("S10")
def named(folder: Path) -> Figure:
    """A frozen process and a frozen loading worker: seconds past the limit until the note, and what it names."""
    wanted = {
        "stopped": ("rank 1 (process ", "forward and backward, step 6; SILENT", "loop.py"),
        "hangs": ("rank 1", "forward and backward, step 6", "broken.py"),
        "worker-stopped": ("rank 0", "loading, step ", "STOPPED) makes step 6, micro-batch"),
        "worker-sleeps": ("rank 0", "loading, step ", "makes step 6, micro-batch"),
    }
    numbers, good = {}, True
    for name, texts in wanted.items():
        one = outcomes()[name]
        absent = [text for text in texts if text not in one.notes]
        past = None if one.noted is None else round(one.noted - LIMIT, 1)
        numbers[name] = {"seconds past the limit": past, "not named": absent}
        good &= past is not None and past < 10 and not absent
    shown = ", ".join(f"{name} {one['seconds past the limit']} s" for name, one in numbers.items())
    return Figure(shown, good, numbers)


@line("S19")
def signals(folder: Path) -> Figure:
    """SIGTERM in every phase, to all processes and to one of two, within a grace of 20 seconds."""
    shards = BROKEN.make(folder / "shards")
    unbroken = train(folder / "unbroken", shards)

    def saving(run: Path) -> bool:
        return any((run / "checkpoints").glob(".tmp-*"))

    phases = {  # breaks, processes, when, whom
        "start": ("slow-start@0", 1, lambda run, tree: time.sleep(2) or True, "all"),
        "indexing": ("", 1, lambda run, tree: (run / "lock").exists(), "all"),
        "first step": ("slow@*", 1, lambda run, tree: (run / "run.json").exists(), "all"),
        "train": ("slow@*", 1, lambda run, tree: step_of(run) >= 3, "all"),
        "train, one of two": ("slow@*", 2, lambda run, tree: step_of(run) >= 3, "first"),
        "train, the other of two": ("slow@*", 2, lambda run, tree: step_of(run) >= 3, "second"),
        "held-out loss": ("slow-held-out@0", 1, lambda run, tree: step_of(run) >= 7, "all"),
        "save": ("slow-save@0", 1, lambda run, tree: saving(run), "all"),
        "save, twice": ("slow-save@0", 1, lambda run, tree: saving(run), "twice"),
    }
    numbers = {}
    for phase, (breaks, processes, when, whom) in phases.items():
        run = folder / phase.replace(" ", "-").replace(",", "")
        with start(run, shards, breaks=breaks, processes=processes, workers=0) as tree:
            assert tree.until(lambda when=when, run=run, tree=tree: when(run, tree), seconds=120), tree.output
            if whom in ("first", "second"):
                ranks = sorted(tree.children(), key=lambda pid: _rank(pid))
                os.kill(ranks[0 if whom == "first" else 1], signal.SIGTERM)
            else:
                tree.kill(signal.SIGTERM)
                if whom == "twice":
                    time.sleep(0.3)
                    tree.kill(signal.SIGTERM)
            begun = time.monotonic()
            code = tree.wait(seconds=20)
        seconds = round(time.monotonic() - begun, 1)
        begun_at_all = (run / "run.json").exists()
        # before the first step there is nothing to save: the process ends at once, and what is there is good to go on
        clean = code == 0 if begun_at_all and step_of(run) >= 0 else code in (0, -signal.SIGTERM)
        saved = step_of(run) < 0 or checkpoint.latest(run / "checkpoints").step == step_of(run) + 1
        with start(run, shards, workers=0) as tree:
            tree.wait(seconds=120)
        same = lines(run) == lines(unbroken) and newest(run) == newest(unbroken)
        good = clean and saved and same
        numbers[phase] = {"code": code, "seconds": seconds, "saved": saved, "goes on alike": same, "good": good}
    good = sum(one["good"] for one in numbers.values())
    longest = max(one["seconds"] for one in numbers.values())
    return Figure(f"{good / len(numbers):.0%} of {len(numbers)} (longest {longest} s)", good == len(numbers), numbers)


def _rank(pid: int) -> int:
    words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((int(word[5:]) for word in words if word.startswith(b"RANK=")), 0)


@line("S20")
def nans(folder: Path) -> Figure:
    """A NaN in the loss on one of two processes, at three steps; the same steps broken alone give the same weights."""
    shards = BROKEN.make(folder / "shards")
    run, alone = folder / "two", folder / "alone"
    with start(run, shards, breaks="nan@4/1 nan@11/0 nan@17/1", processes=2) as tree:
        if tree.wait(seconds=120) != 0:
            raise RuntimeError(tree.output[-2000:])
    train(alone, shards, "nan@4 nan@11 nan@17")
    skipped = [one["step"] for one in lines(run) if one.get("skipped")]
    agree = newest(run)["model.safetensors"] == newest(alone)["model.safetensors"]
    numbers = {"injected": [4, 11, 17], "skipped": skipped, "weights as in one process": agree}
    shown = f"{len(skipped) / 3:.1f} / {'100 %' if agree else 'they differ'}"
    return Figure(shown, skipped == [4, 11, 17] and agree, numbers)


@line("S22")
def left_over(folder: Path) -> Figure:
    """Memory over 20,000 samples, descriptors of a loading worker, and what a killed run of two processes leaves."""
    shards = BROKEN.make(folder / "shards")
    stage = find_recipe(Path(__file__).parent / "broken.py").function(**shards, steps=10**6).stages[0]
    source = MicroBatches.of(stage, open_units(stage, stage.data, None), seed=0, number=0)
    at, memory = 0, {}
    for made in load(source, slots(stage, 0, 0, 20_000 // stage.batch + 1, 0, 1), 0):
        at += len(made.units)
        if at in (4_000, 20_000):
            memory[at] = _resident()
    growth = memory[20_000] - memory[4_000]
    run, before = folder / "run", _shared()
    with start(run, shards, breaks="slow@*", processes=2, workers=2) as tree:
        assert tree.until(lambda: step_of(run) >= 4, seconds=120), tree.output
        ranks = tree.children()
        workers = [pid for rank in ranks for pid in tree.children(rank)]
        first = max(len(os.listdir(f"/proc/{pid}/fd")) for pid in workers)
        assert tree.until(lambda: step_of(run) >= 18, seconds=120), tree.output
        growing = max(len(os.listdir(f"/proc/{pid}/fd")) for pid in workers) - first
        pids = {str(pid) for pid in tree.living()}
        os.kill(ranks[0], signal.SIGKILL)
        deadline = time.monotonic() + 20
        while tree.living() and time.monotonic() < deadline:
            time.sleep(0.05)
        processes = len(tree.living())
    segments = len([name for name in _shared() - before if any(pid in name for pid in pids)])
    numbers = {"bytes": growth, "descriptors": growing, "processes": processes, "segments": segments}
    good = growth < 4 << 20 and growing <= 2 and processes == segments == 0
    return Figure(f"{growth / 1024:.0f} kB / {growing:+d} / {processes} and {segments}", good, numbers)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _shared() -> set[str]:
    return set(os.listdir("/dev/shm"))
