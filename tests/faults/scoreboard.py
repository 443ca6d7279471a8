"""The scoreboard: break mmpre in every way that `docs/faults.md` lists and print what came of it.

    make scoreboard                            all lines
    python -m tests.faults.scoreboard S1 S14   some of them

Prints a table, writes it as `scoreboard.md` and the numbers behind it as `scoreboard.json`. Exit code 1 where a hard
line misses its target.
"""

import argparse
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the tests' helpers import each other by name

from lines import LINES, TAKES  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

LIMIT_SECONDS = 900  # for a line


def main() -> int:
    parser = argparse.ArgumentParser(prog="scoreboard", description=__doc__.split("\n")[0])
    parser.add_argument("lines", nargs="*", metavar="LINE", help="such as S14; by default all")
    parser.add_argument(
        "--out", type=Path, default=Path("scoreboard.json"), help="JSON file to write, with the table beside it"
    )
    asked = parser.parse_args()
    for file in sorted(HERE.glob("lines_*.py")):
        importlib.import_module(file.stem)
    if unknown := set(asked.lines) - set(LINES):
        parser.error(f"there is no line {', '.join(sorted(unknown))}; there are {', '.join(LINES)}")
    board = {"where": _where(), "lines": {}}
    for name in asked.lines or LINES:
        board["lines"][name] = _take(name)
        asked.out.write_text(json.dumps(board, indent=1, default=str) + "\n")
        asked.out.with_suffix(".md").write_text(_markdown(board))
    _print(board)
    return int(any(one["verdict"] in ("MISSED", "ERROR") and one["hard"] for one in board["lines"].values()))


def _take(name: str) -> dict[str, object]:
    about = LINES[name]
    told = {"title": about.title, "target": about.target, "hard": about.hard}
    if name not in TAKES:
        return told | {"verdict": "not taken yet", "shown": "", "seconds": 0.0}
    print(f"{name}: {about.title} ...", file=sys.stderr, flush=True)
    begun = time.perf_counter()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(LIMIT_SECONDS)
    try:
        with tempfile.TemporaryDirectory(prefix=f"scoreboard-{name}-") as folder:
            figure = TAKES[name](Path(folder))
        verdict = "met" if figure.good else "MISSED" if about.hard else "missed"
        told |= {"verdict": verdict, "shown": figure.shown, "numbers": figure.numbers}
    except Exception as e:
        told |= {"verdict": "ERROR", "shown": f"{type(e).__name__}: {e}"[:300], "numbers": traceback.format_exc()}
        traceback.print_exc()
    finally:
        signal.alarm(0)
    told["seconds"] = round(time.perf_counter() - begun, 1)
    print(f"{name}: {told['shown']}  {told['verdict']}, {told['seconds']} s", file=sys.stderr, flush=True)
    return told


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"the line took more than {LIMIT_SECONDS} s")


def _where() -> dict[str, object]:
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(HERE), *words], capture_output=True, text=True)
        return done.stdout.strip()

    packages = ("mmpre", "torch", "numpy", "safetensors", "webdataset", "tokenizers")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "commit": git("rev-parse", "HEAD"),
        "changed": bool(git("status", "--porcelain")),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _markdown(board: dict) -> str:
    where, versions = (
        board["where"],
        ", ".join(f"{n} {v}" for n, v in board["where"]["versions"].items() if n != "mmpre"),
    )
    changed = " with changes" if where["changed"] else ""
    told = (
        f"Taken on {where['date'][:10]} on {where['machine']}, {where['cores']} cores, Python {where['python']}, "
        f"{versions}, at commit {where['commit'][:9]}{changed}.\n\n"
        "| | figure | target | measured | verdict | seconds |\n| --- | --- | --- | --- | --- | --- |\n"
    )
    for name, one in board["lines"].items():
        shown = one["shown"].replace("|", "\\|").replace("\n", " ")
        told += f"| {name} | {one['title']} | {one['target']} | {shown} | {one['verdict']} | {one['seconds']:.0f} |\n"
    return told


def _print(board: dict) -> None:
    where = board["where"]
    table = Table(
        title=f"mmpre {where['commit'][:9]}{' and changes' if where['changed'] else ''}, {where['date'][:10]}, "
        f"{where['cores']} cores, torch {where['versions']['torch']}",
        title_justify="left",
    )
    for column in ("", "figure", "target", "measured", "verdict", "s"):
        table.add_column(column, justify="right" if column == "s" else "left")
    for name, one in board["lines"].items():
        gate = "" if one["hard"] else " (soft)"
        table.add_row(name, one["title"], one["target"] + gate, one["shown"], one["verdict"], f"{one['seconds']:.0f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"{sum(one['seconds'] for one in board['lines'].values()) / 60:.1f} minutes")


if __name__ == "__main__":
    sys.exit(main())
