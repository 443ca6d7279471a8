"""Lines of the scoreboard about the position in the data and going on from it."""

import json
import random
import statistics
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import recording
from cases import BROKEN, CASES, STEPS, Case, flags
from harness import Tree, lines, mmpre, newest, step_of
from lines import Figure, line
from runs import RECIPE

import mmpre as library
from mmpre.data.loader import MicroBatches, load, slots
from mmpre.runs import checkpoint
from mmpre.runs.metrics import read_metrics
from mmpre.runs.options import RunOptions
from mmpre.runs.run import open_units

HERE = Path(__file__).parent
WORLDS, WORKERS = (1, 2, 4), (0, 1, 2, 3)
KILLS = 5  # of each case


def alike(one: Path, other: Path) -> tuple[int, bool]:
    """How many logged lines differ, and whether weights, optimizer, state and holes are the same."""
    a, b = lines(one), lines(other)
    different = sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))
    holes = [path.read_text() if path.exists() else "" for path in (one / "ledger.jsonl", other / "ledger.jsonl")]
    return different, newest(one) == newest(other) and holes[0] == holes[1]


@line("S1")
def kills(folder: Path) -> Figure:
    """Kill all processes at random steps, go on with other numbers of processes and workers, compare with no kill."""
    dice, numbers = random.Random(0), {}
    for case in CASES.values():
        shards = case.make(folder / case.name / "shards")
        unbroken, run = folder / case.name / "unbroken", folder / case.name / "killed"
        options = RunOptions(exact=True, workers=0, threads=1, save_every=5, log_every=1)
        library.train(case.recipe, out=unbroken, options=options, **case.numbers, **shards)
        killed, shapes = 0, []
        for step in [*sorted(dice.sample(range(1, STEPS - 2), KILLS)), STEPS]:
            shape = dice.choice((1, 1, 2)), dice.choice((0, 1, 2))
            words = ["resume", run] if (run / "run.json").exists() else [
                "train", case.recipe, "--out", run, "--save-every", 5, *flags(case, shards)]  # fmt: skip
            with mmpre(*words, "--workers", shape[1], processes=shape[0], log=run.with_suffix(".log")) as tree:
                if tree.until(lambda run=run, step=step: step_of(run) >= step, seconds=120):
                    tree.kill()
                    killed += 1
                elif tree.wait(seconds=60) != 0:
                    raise RuntimeError(tree.output[-2000:])
            shapes.append(shape)
        different, same = alike(run, unbroken)
        numbers[case.name] = {"kills": killed, "shapes": shapes, "lines that differ": different, "same": same}
    total = sum(one["kills"] for one in numbers.values())
    different = sum(one["lines that differ"] for one in numbers.values())
    same = all(one["same"] for one in numbers.values())
    shown = f"{different} / {'yes' if same else 'no'} ({total} kills of {', '.join(numbers)})"
    return Figure(shown, different == 0 and same and total >= 20, numbers)


def run_cells(folder: Path, world: int, cells: list[dict]) -> None:
    """Carry out runs in `world` processes."""
    path = folder / f"cells-{world}.json"
    path.write_text(json.dumps(cells, default=str))
    command = [sys.executable]
    if world > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    with Tree([*command, str(HERE / "cells.py"), str(path)], folder / f"cells-{world}.log") as tree:
        if tree.wait(seconds=800) != 0:
            raise RuntimeError(tree.output[-3000:])


def cell(case: Case, shards: dict, out: Path, *, exact: bool, workers: int, **more: object) -> dict:
    options = {"exact": exact, "workers": workers, "threads": 1, "log_every": 1, "save_every": 1000}
    return {"recipe": case.recipe, "out": str(out), "options": options, "numbers": {**case.numbers, **shards, **more}}


@line("S2")
def elastic(folder: Path) -> Figure:
    """Every number of processes with every number of workers: exact runs are alike, fast ones get the same batches."""
    shards = {case.name: case.make(folder / case.name) for case in CASES.values()}

    def out(world: int, workers: int, case: str, exact: bool) -> Path:
        return folder / f"{world}-{workers}-{case}-{'exact' if exact else 'fast'}"

    for world in WORLDS:
        run_cells(folder, world, [
            cell(case, shards[case.name], out(world, workers, case.name, exact), exact=exact, workers=workers, steps=12)
            for case in CASES.values() for workers in WORKERS for exact in (True, False)
        ])  # fmt: skip
    numbers, exact_cells, fast_cells = {}, 0, 0
    for world in WORLDS:
        for workers in WORKERS:
            found = {}
            for name in CASES:
                first = out(1, 0, name, True)
                different, same = alike(out(world, workers, name, True), first)
                given = [recording.read(Path(f"{out(world, workers, name, e)}.given")) for e in (True, False)]
                found[name] = [different == 0 and same, given[0] == given[1] == recording.read(Path(f"{first}.given"))]
            exact_cells += all(one for one, _ in found.values())
            fast_cells += all(one for _, one in found.values())
            numbers[f"{world} processes, {workers} workers"] = found
    cells = len(WORLDS) * len(WORKERS)
    shown = f"{exact_cells}/{cells}; {fast_cells}/{cells} ({', '.join(CASES)})"
    return Figure(shown, exact_cells == fast_cells == cells, numbers)


@line("S3")
def lost_and_doubled(folder: Path) -> Figure:
    """Three epochs of 120 samples in steps of 20, killed five times: what was given, in its order."""
    shards = BROKEN.make(folder / "shards")
    run, plain, log, steps = folder / "run", folder / "plain", folder / "run.given", 18

    def tree(out: Path, given: Path, processes: int, workers: int) -> Tree:
        words = ["resume", out] if (out / "run.json").exists() else [
            "train", RECIPE, "--out", out, "--exact", "--log-every", 1, "--save-every", 2, "--steps", steps,
            "--batch", 20, "--data", *shards["data"]]  # fmt: skip
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        words = [*command, HERE / "recording.py", given, *words, "--workers", workers]
        return Tree(list(map(str, words)), out.with_suffix(".log"), env={"BREAK": "slow@*"})

    with tree(plain, folder / "plain.given", 1, 0) as unbroken:
        assert unbroken.wait(seconds=120) == 0, unbroken.output
    for step, shape in zip((2, 5, 8, 11, 15), ((1, 1), (2, 0), (1, 2), (2, 1), (1, 0)), strict=True):
        with tree(run, log, *shape) as one:
            assert one.until(lambda step=step: step_of(run) >= step), one.output
            one.kill()
    with tree(run, log, 2, 1) as one:
        assert one.wait(seconds=120) == 0, one.output
    wanted, given = dict(recording.read(folder / "plain.given")), {}
    differ = 0  # a step that is done again is given what it was given before
    for step, parts in recording.read(log):
        differ += given.setdefault(step, parts) != parts
        differ += wanted[step] != parts
    lost = doubled = 0
    for epoch in range(3):
        parts = [part for step in range(epoch * 6, epoch * 6 + 6) for part in given[step].values()]
        counts = Counter(unit for part in parts for unit in part)
        lost += 120 - len(counts)
        doubled += sum(counts.values()) - len(counts)
    numbers = {"steps given another batch than unbroken": differ, "steps given in all": len(recording.read(log))}
    return Figure(f"{lost} / {doubled}", lost == doubled == differ == 0, numbers)


@line("S4")
def seek(folder: Path) -> Figure:
    """Seconds to the first micro-batch from step 0 and from step 1,000,000, without workers, medians of 15."""
    shards = BROKEN.make(folder)
    recipe = library.plugins.find_recipe(RECIPE).function(**shards, steps=2_000_000)
    stage = recipe.stages[0]

    def once(first: int) -> float:
        units = open_units(stage, stage.data, None)
        begun = time.perf_counter()
        source = MicroBatches.of(stage, units, seed=0, number=0)
        next(iter(load(source, slots(stage, 0, first, stage.steps, 0, 1), 0)))
        return time.perf_counter() - begun

    once(0)
    taken = {first: [] for first in (0, 1_000_000)}
    for _ in range(15):
        for first, some in taken.items():
            some.append(once(first))
    start, far = (statistics.median(some) for some in taken.values())
    shown = f"{far / start:.2f} ({start * 1e3:.1f} ms, {far * 1e3:.1f} ms)"
    return Figure(shown, far / start < 1.2 or far - start < 0.05, {"start": start, "far": far})


@line("S5")
def state_size(folder: Path) -> Figure:
    """Bytes of a checkpoint's state without the optimizer's part, after the same steps on 120 and 12,000 samples."""
    sizes = {}
    for count in (120, 12_000):
        case = replace(BROKEN, name=f"{count}", count=count)
        shards = case.make(folder / f"{count}")
        run = library.train(RECIPE, out=folder / f"run-{count}", options=RunOptions(workers=0), steps=10, **shards)
        state = dict(checkpoint.latest(run / "checkpoints").state)
        del state["optimizer"]
        sizes[count] = len(json.dumps(state))
    small, large = sizes.values()
    return Figure(f"{small}, {large} bytes", large < 4096 and large - small < 200, sizes)


@line("S7")
def closes(folder: Path) -> Figure:
    """Of every step: rows planned = rows trained + holes named in the ledger; in four shapes alike."""
    case = CASES["uniter"]
    shards, numbers, tables = case.make(folder / "shards"), {}, []
    shapes = [(1, 0), (1, 2), (2, 1), (4, 0)]
    for world in (1, 2, 4):
        run_cells(folder, world, [
            cell(case, shards, folder / f"{world}-{workers}", exact=True, workers=workers)
            for w, workers in shapes if w == world
        ])  # fmt: skip
    open_steps = 0
    for world, workers in shapes:
        run = folder / f"{world}-{workers}"
        holes = Counter(json.loads(one)["step"] for one in (run / "ledger.jsonl").read_text().splitlines())
        rows = {one["step"]: one["rows"] for one in lines(run) if "loss" in one}
        open_steps += sum(rows[step] + holes[step] != case.numbers["batch"] for step in range(STEPS))
        tables.append(checkpoint.latest(run / "checkpoints").state["ledger"])
        numbers[f"{world} processes, {workers} workers"] = {"rows": sum(rows.values()), "holes": sum(holes.values())}
    same = all(table == tables[0] for table in tables)
    lost = sum(next(iter(numbers.values())).values())
    shown = f"{'exact' if not open_steps and same else f'{open_steps} steps do not close'}: {lost} = " + " + ".join(
        f"{count} {name}" for name, count in next(iter(numbers.values())).items()
    )
    return Figure(shown, open_steps == 0 and same and lost == STEPS * case.numbers["batch"], numbers)


@line("S18")
def cost_of_exact(folder: Path) -> Figure:
    """Seconds a step of BERT at width 128, exact and fast in turns, alone on one thread; medians of three."""
    case = CASES["bert"]
    shards = case.make(folder / "shards")
    numbers = case.numbers | {
        "width": 128,
        "depth": 4,
        "batch": 32,
        "micro_batches": 2,
        "steps": 30,
        "valid_every": 999,
    }
    taken: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(3):
        for exact, some in taken.items():
            options = RunOptions(exact=exact, threads=1, workers=0, log_every=1, save_every=1000)
            run = library.train(
                case.recipe, out=folder / f"{turn}-{exact}", options=options, data=shards["data"], **numbers
            )
            at = {one["step"]: one["time"]["seconds"] for one in read_metrics(run / "metrics.jsonl") if "loss" in one}
            some.append((at[28] - at[4]) / 24)
    fast, exact = (statistics.median(some) for some in taken.values())
    shown = f"{exact / fast - 1:+.1%} ({fast * 1e3:.1f} ms, {exact * 1e3:.1f} ms)"
    return Figure(shown, exact / fast < 1.15, {"fast": taken[False], "exact": taken[True]})
