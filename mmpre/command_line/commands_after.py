"""The commands that look ahead of a run and carry it away. Heavy imports stand inside the functions."""

import re
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import tyro

from mmpre.command_line.shared import as_json

Run = tyro.conf.Positional[str]


def export(rest: list[str]) -> None:
    def go(run: Run, out: Path, to: str | None = None, best: bool = False, json: bool = False) -> None:
        """A folder that another library loads: configuration, safetensors, and what makes its inputs.

        The library loads it back and must give the same states before the folder gets its name.

        Args:
            run: The run's folder.
            out: The folder to write, which must not be there yet.
            to: An exporter by its name (`mmpre list`); by default the first whose class is the same function.
            best: Use the weights with the best held-out loss, not the newest.
            json: Print JSON for programs.
        """
        from mmpre.exchange.export import export as export_run

        told = export_run(run, out, to=to, best=best)
        print(as_json(told) if json else "\n  ".join(told.lines()))

    tyro.cli(go, args=rest, prog="mmpre export")


def embed(rest: list[str]) -> None:
    def go(
        run: Run, data: tuple[str, ...], out: Path, layer: int | None = None, pool: str = "mean",
        roles: tuple[str, ...] = (), sidecar: str | None = None, best: bool = False, batch: int = 32,
        processes: int | None = None, threads: int = 1, max_holes: float = 0.05, json: bool = False,
    ) -> None:  # fmt: skip
        """Features of every row of some shards, with their keys, in one file of safetensors or Parquet.

        Run it again after a kill: it goes on, and the file is the same to the byte. Under torchrun its processes share
        the work.

        Args:
            run: The run's folder.
            data: Shards: paths, folders, globs, urls, or patterns such as a-{000..009}.tar.
            out: The file to write, .safetensors or .parquet.
            layer: Of the encoder, 0 for what comes in; by default the network's result.
            pool: mean over a row's ordinary tokens, first token, none for all tokens, or tower for vectors in the space
                that a recipe's towers share; each role by itself.
            roles: Of the network; by default all.
            sidecar: Sidecar folder of these shards.
            best: Use the weights with the best held-out loss, not the newest.
            batch: Rows at once; 1 gives what each row gives alone, others differ from it in last bits.
            processes: To share the work; by default one for each core, or GPU.
            threads: Of each process's arithmetic.
            max_holes: Share of rows that cannot be read past which it stops.
            json: Print JSON for programs.
        """
        from mmpre.embed import embed as embed_data

        told = embed_data(
            run, data, out, sidecar=sidecar, layer=layer, pool=pool, roles=roles, best=best, batch=batch,
            processes=processes, threads=threads, max_holes=max_holes,
        )  # fmt: skip
        if json:
            print(as_json(told))
            return
        causes = ", ".join(f"{cause}: {count}" for cause, count in told["holes"].items())
        holes = f"; {sum(told['holes'].values())} are holes ({causes}), named in {told['named_in']}" if causes else ""
        print(f"{told['out']}: {told['rows']:,} of {told['of']:,} rows{holes}")

    tyro.cli(go, args=rest, prog="mmpre embed")


def plan(rest: list[str]) -> None:
    if not rest or rest[0].startswith("-"):
        print("usage: mmpre plan RECIPE [--scale SCALE] [--gpus N] [--gpu-memory GB] [--json] [--any-number VALUE]\n\n"
              "Parameters, FLOPs, memory and time of a recipe, with no data and no GPU; `mmpre plan RECIPE --help` "
              "lists all that can be asked.")  # fmt: skip
        if not rest or rest[0] not in ("-h", "--help"):
            sys.exit(2)
        return
    from mmpre.command_line.arguments import changed, recipe_class, split, take
    from mmpre.plan import PlanOptions
    from mmpre.plan import plan as plan_recipe
    from mmpre.plan.table import lines
    from mmpre.plugins import find_recipe

    found = find_recipe(rest[0])
    for_programs = "--json" in rest
    scale, flags = take([word for word in rest[1:] if word != "--json"], "--scale")
    about = re.sub(r"\n+(?=\S)", "\n\n", found.doc.strip())
    kind = recipe_class(found, found.defaults(scale), PlanOptions, out=None)
    asked = tyro.cli(kind, args=flags, prog=f"mmpre plan {rest[0]}", description=about)
    numbers, given = split(asked, PlanOptions)
    options = PlanOptions(**given)
    recipe = found.path if found.is_file else found.name
    told = plan_recipe(recipe, scale=scale, options=options, **changed(numbers, found.defaults(scale)))
    print(as_json(told) if for_programs else "\n".join(lines(told, options)))


def claim(rest: list[str]) -> None:
    if not rest or rest[0].startswith("-"):
        print("usage: mmpre claim RECIPE [--scale SCALE] [--seeds N] [--quick] [--on SET ...] [--at-once N] "
              "[--out-page NAME] [--json] [--any-number VALUE]\n\nTrains what a paper compares, over seeds, and says "
              "whether the difference was seen: claim.md, claim.json, claim.svg in --out (by default claims/RECIPE).\n"
              "Do it again to go on after a stop; what is finished is kept.")  # fmt: skip
        if not rest or rest[0] not in ("-h", "--help"):
            sys.exit(2)
        return
    from rich.console import Console

    from mmpre.claims.claim import ClaimOptions
    from mmpre.claims.claim import claim as make
    from mmpre.claims.page import table
    from mmpre.command_line.arguments import changed, recipe_class, split, take
    from mmpre.plugins import find_recipe

    found = find_recipe(rest[0])
    scale, flags = take(rest[1:], "--scale")
    scale = scale or "tiny"
    defaults = found.defaults(scale)
    if found.claim is not None:
        defaults |= found.claim.quick if "--quick" in flags else found.claim.numbers
    kind = recipe_class(found, defaults, ClaimOptions, out="the folder of its runs; by default claims/RECIPE")
    asked = tyro.cli(kind, args=flags, prog=f"mmpre claim {rest[0]}")
    numbers, given = split(asked, ClaimOptions)
    with redirect_stdout(sys.stderr) if given["json"] else nullcontext():  # where trainings tell how far they are
        told = make(
            found.path if found.is_file else found.name, asked.out or Path("claims") / found.name, scale=scale,
            options=ClaimOptions(**given), **changed(numbers, defaults),
        )  # fmt: skip
    if given["json"]:
        print(as_json(told))
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(table(told))
