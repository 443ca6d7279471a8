"""What each command does, but for those of `mmpre data`. Heavy imports stand inside the functions."""

import sys
from pathlib import Path
from typing import Any

import tyro

from mmpre.command_line.commands_after import claim, embed, export, plan
from mmpre.command_line.shared import Command, Paths, as_json
from mmpre.plugins import names, survey


def list_(rest: list[str]) -> None:
    def show(json: bool = False) -> None:
        """Recipes, modalities and data sets that are installed.

        Args:
            json: Print JSON for programs.
        """
        _list(json)

    tyro.cli(show, args=rest, prog="mmpre list")


def _list(for_programs: bool) -> None:
    kinds = {"recipes": "recipe", "modalities": "modality", "data sets": "data set", "benchmarks": "benchmark",
             "imports": "import", "exports": "export"}  # fmt: skip
    found: dict[str, Any] = {}
    for title, kind in kinds.items():
        good, bad = survey(kind)
        found[title] = {
            name: {
                "about": getattr(module, "description", None) or (module.__doc__ or "").strip().split("\n")[0],
                **({"scales": sorted(getattr(module, "scales", {}))} if kind == "recipe" else {}),
                **({"licence": module.licence, "size": module.size} if kind == "data set" else {}),
            }
            for name, module in good.items()
        }
        if bad:
            found.setdefault("disabled", {}).update(bad)
    if for_programs:
        print(as_json(found))
        return
    from rich.console import Console
    from rich.table import Table

    for title, some in found.items():
        table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
        for name, about in some.items():
            table.add_row(name, about if isinstance(about, str) else about["about"],
                          "" if isinstance(about, str) else ", ".join(about.get("scales", [])))  # fmt: skip
        Console().print(table)


def train(rest: list[str]) -> None:
    if not rest or rest[0].startswith("-"):
        print("usage: mmpre train RECIPE [--scale SCALE] [--out DIR] [--any-number VALUE ...]\n\n"
              f"RECIPE is one of {', '.join(names('recipe'))}, or the path of a .py file; "
              "`mmpre train RECIPE --help` lists its numbers.")  # fmt: skip
        if not rest or rest[0] not in ("-h", "--help"):
            sys.exit(2)
        return
    from mmpre.command_line.arguments import asked_of
    from mmpre.runs.run import train as train_run

    recipe, asked = asked_of(rest, "mmpre train")
    train_run(recipe, **asked)


def import_(rest: list[str]) -> None:
    if len(rest) < 2 or any(word.startswith("-") for word in rest[:2]):
        print("usage: mmpre import FOLDER RECIPE [--scale SCALE] [--out RUN] [--any-number VALUE ...]\n\n"
              "FOLDER is a model of transformers or timm: config.json and safetensors. What differs from the "
              "recipe is told.\nWith --out, a run with its weights is written, which `mmpre resume` trains.\n"
              "  --into NAME   the network to fill, by its name in the recipe (by default network)\n"
              "  --role NAME   the modality that it is for, where the recipe calls it otherwise")  # fmt: skip
        if not rest or rest[0] not in ("-h", "--help"):
            sys.exit(2)
        return
    from mmpre.command_line.arguments import asked_of, take
    from mmpre.exchange.imported_run import import_model

    folder, *words = rest
    into, words = take(words, "--into")
    role, words = take(words, "--role")
    recipe, asked = asked_of(words, "mmpre import FOLDER")
    report = import_model(folder, recipe, into=into or "network", role=role, **asked)
    print("\n".join(report.lines()))


def resume(rest: list[str]) -> None:
    def go(
        run: tyro.conf.Positional[str], data: tuple[str, ...] = (), valid: tuple[str, ...] = (),
        sidecar: str | None = None, valid_sidecar: str | None = None, parallel: str | None = None,
        workers: int | None = None, threads: int | None = None, save_every: int | None = None, keep: int | None = None,
        log_every: int | None = None, max_holes: float | None = None, max_skipped: int | None = None,
        max_unsaved: int | None = None, hang_seconds: float | None = None, log_to: str | None = None,
    ) -> None:  # fmt: skip
        """Go on with a run from its newest valid checkpoint.

        Args:
            run: The run's folder.
            data: Where the training shards are now, if they have moved.
            valid: Where the held-out shards are now.
            sidecar: Where the training shards' sidecar is now.
            valid_sidecar: Where the held-out shards' sidecar is now.
            parallel: How processes join gradients: sum, ddp, fsdp or auto.
            workers: Loading processes.
            threads: Of this process's arithmetic.
            save_every: Steps between checkpoints.
            keep: Checkpoints kept, beside the best one.
            log_every: Steps between logged steps.
            max_holes: Share of unusable samples past which the run stops.
            max_skipped: Skipped steps in a row past which the run stops.
            max_unsaved: Saves that fail in a row past which the run stops.
            hang_seconds: Without a sign of life after which the run ends itself.
            log_to: Also to tensorboard, wandb or trackio, with commas between them.
        """
        from mmpre.runs.run import resume as resume_run

        changes = {k: v for k, v in locals().items() if k not in ("run", "resume_run") and v not in (None, ())}
        resume_run(run, **changes)

    tyro.cli(go, args=rest, prog="mmpre resume")


def replay(rest: list[str]) -> None:
    def go(run: tyro.conf.Positional[str], step: int, json: bool = False) -> int:
        """Do one step again, from the checkpoint before it, and compare every number with the log; writes nothing.

        Args:
            run: The run's folder.
            step: The step, as metrics.jsonl counts them.
            json: Print JSON for programs.
        """
        from mmpre.runs.replay import replay as again

        told = again(run, step)
        if json:
            print(as_json(told))
        else:
            print(f"step {told['step']}, task {told['task']}, from step {told['from']}: "
                  f"{ {None: 'not logged', True: 'as logged', False: 'NOT as logged'}[told['same']] }")  # fmt: skip
            for name, value in told["now"].items():
                logged = told["logged"] and told["logged"][name]
                print(f"  {name} {value!r}" + ("" if logged in (None, value, str(value)) else f", logged {logged!r}"))
            print("  " + "\n  ".join(filter(None, [told["cause"], *told["keys"]])))
        return 1 if told["same"] is False else 0

    return tyro.cli(go, args=rest, prog="mmpre replay")


def eval_(rest: list[str]) -> None:
    def go(
        runs: Paths, data: tuple[str, ...] = (), sidecar: str | None = None, on: tuple[Path, ...] = (),
        best: bool = False, rows: int = 2048, kinds: tuple[str, ...] = (), json: bool = False, table: bool = False,
    ) -> None:  # fmt: skip
        """What runs learned, on held-out data, beside the same networks untrained and beside no network.

        Measured are the tasks' held-out losses, what the recipe names, and the tasks on the data set's card: probes,
        neighbours, retrieval. Kept as evaluation.json in the run's folder.

        Args:
            runs: Folders of runs.
            data: Shards to evaluate on; by default the run's held-out ones.
            sidecar: Sidecar folder of these shards.
            on: Folders of data sets whose cards' tasks are measured; by default, without --data, the run's own set.
            best: Use the weights with the best held-out loss, not the newest.
            rows: Rows that the tasks' losses are taken over, at most.
            kinds: Kinds of the cards' tasks that are measured, such as similarity; by default all.
            json: Print JSON for programs.
            table: Measure nothing, print how runs were made and what was measured before, in Markdown; runs that
                differ by their seed are told together.
        """
        from mmpre.evaluation import page
        from mmpre.evaluation.evaluate import evaluate

        if not runs:
            print("mmpre eval: name the folder of a run", file=sys.stderr)
            sys.exit(2)
        if table:
            print(page.page([Path(run) for run in runs]))
            return
        for run in runs:
            answer = evaluate(run, data=data, sidecar=sidecar, best=best, rows=rows, sets=on, kinds=kinds or None)
            if json:
                print(as_json(answer))
                continue
            from rich.console import Console

            console = Console(width=None if sys.stdout.isatty() else 160)
            heading = f"{answer['recipe']}, step {answer['step']}, {answer['trained']['rows']} rows"
            console.print(page.table(heading, answer))
            for name, why in answer.get("not measured", {}).items():
                console.print(f"not measured: {name} ({why})", markup=False, highlight=False)

    tyro.cli(go, args=rest, prog="mmpre eval")


def report(rest: list[str]) -> None:
    def go(runs: Paths, out: Path | None = None, data: tuple[str, ...] = (), sidecar: str | None = None) -> None:
        """One page that tells what runs did and learned; it opens from disk and fetches nothing.

        Args:
            runs: Folders of runs; several are laid over each other, with a table of where they differ.
            out: The file to write; by default report.html in the first run's folder.
            data: Shards whose rows the networks are shown; by default each run's held-out ones.
            sidecar: Sidecar folder of these shards.
        """
        from mmpre.report.page import report as write

        print(write(runs, out, data=data, sidecar=sidecar))

    tyro.cli(go, args=rest, prog="mmpre report")


def demo(rest: list[str]) -> None:
    def go(out: Path = Path("demo")) -> None:
        """UNITER on collages of OpenMoji: build the data, pretrain, evaluate, draw what it learned.

        Args:
            out: Folder for the data, the run and the picture.
        """
        from mmpre.command_line.demo import main

        main(out)

    tyro.cli(go, args=rest, prog="mmpre demo")


def bench(rest: list[str]) -> None:
    def go(
        which: Paths = (), json: bool = False, out: Path | None = None, repeats: int = 3, threads: int | None = None,
        steps: int | None = None, cases: str = "", data: tuple[Path, ...] = (), fetch: bool = False,
    ) -> None:  # fmt: skip
        """Speed, side by side with what people use today, on this machine. Leave the machine alone meanwhile.

        Args:
            which: Benchmarks to run; by default all of them (`mmpre list` names them).
            json: Print JSON for programs, at the end.
            out: File to write all of it to as well, after each comparison: FILE.json, or FILE.md with tables.
            repeats: Turns of each contender.
            threads: Of each contender's arithmetic; by default one for each core.
            steps: Timed steps in a turn, in place of each benchmark's own number.
            cases: Only those whose title holds this, such as "12 x 768".
            data: Folders of text data sets to read; by default sotu.
            fetch: Download the data set where it is missing.
        """
        from mmpre.benchmark import Settings, run

        given = {"threads": threads} if threads is not None else {}
        settings = Settings(
            repeats=repeats, steps=steps, cases=cases, data=data, fetch=fetch,
            say=lambda text: print(text, file=sys.stderr, flush=True), **given,
        )  # fmt: skip
        run(which or tuple(names("benchmark")), settings, as_json=json, out=out)

    tyro.cli(go, args=rest, prog="mmpre bench")


def new_modality(rest: list[str]) -> None:
    def go(name: tyro.conf.Positional[str], out: Path = Path()) -> None:
        """Write a modality of your own to start from, NAME.py, and its test, which passes as it is.

        Args:
            name: What it is called, as a Python module: wrist_motion.
            out: Folder for the two files.
        """
        from mmpre.command_line.new_modality import NEXT, new_modality

        module, test = new_modality(name, out)
        print(NEXT.format(module=module, test=test))

    tyro.cli(go, args=rest, prog="mmpre new-modality")


TOP: dict[str, Command] = {
    "list": list_, "plan": plan, "train": train, "resume": resume, "replay": replay, "import": import_, "eval": eval_,
    "claim": claim, "report": report, "embed": embed, "export": export, "demo": demo, "bench": bench,
    "new-modality": new_modality,
}  # fmt: skip
