"""The commands that look ahead of a run and carry it away. Heavy imports stand inside the functions."""

import dataclasses
import json as json_
from pathlib import Path

import tyro

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
        from mmpre.export import export as export_run

        told = export_run(run, out, to=to, best=best)
        print(json_.dumps(dataclasses.asdict(told), indent=2, default=str) if json else "\n  ".join(told.lines()))

    tyro.cli(go, args=rest, prog="mmpre export")
