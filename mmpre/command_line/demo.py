"""`mmpre demo`: UNITER on collages of OpenMoji, from pictures to numbers, a picture and a page of what was learned."""

import sys
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

if not find_spec("matplotlib"):
    raise ImportError("the demo draws with matplotlib and builds its data of packages: pip install 'mmpre[demo]'")

from mmpre.evaluation.evaluate import evaluate
from mmpre.evaluation.grounding import Grounding
from mmpre.evaluation.page import table
from mmpre.evaluation.picture import draw
from mmpre.evaluation.reading import Reading
from mmpre.evaluation.retrieval import PairRetrieval
from mmpre.plugins import find_data_set
from mmpre.processes.processes import Processes
from mmpre.report.page import report
from mmpre.runs.options import RunOptions
from mmpre.runs.run import load, open_units, resume, train

CREDIT = "Pictures: OpenMoji (openmoji.org), CC-BY-SA-4.0"
SPLITS = {"test": "concepts seen in training", "test-unseen": "concepts never seen"}


def main(out: Path = Path("demo")) -> None:
    """Build the data, pretrain, evaluate, draw. A demo that was interrupted goes on where it was."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    data, run = out / "collages", out / "run"
    if not (data / "card.json").exists():
        find_data_set("collages").build(data)
    if (run / "run.json").exists():
        resume(run)
    else:
        numbers = {"data": (str(data / "train"),), "sidecar": str(data / "regions" / "train"),
                   "valid": (str(data / "valid"),), "valid_sidecar": str(data / "regions" / "valid"),
                   "tokenizer": str(data / "tokenizer.json")}  # fmt: skip
        train("uniter", scale="tiny", out=run, options=RunOptions(save_every=1000), **numbers)
    if not load(run).record.get("outcome", {}).get("finished"):
        sys.exit(f"mmpre demo: training was stopped and saved; the same command goes on ({run})")
    answers = {
        split: evaluate(run, data=[str(data / split)], sidecar=str(data / "regions" / split)) for split in SPLITS
    }
    for split, answer in answers.items():
        console.print(table(f"UNITER tiny on {answer['trained']['rows']} held-out collages, {SPLITS[split]}", answer))
    picture = paint(run, data / "test", data / "regions" / "test", out / "what-it-learned.png")
    page = report([run], out / "report.html", data=[str(data / "test")], sidecar=str(data / "regions" / "test"))
    console.print(f"picture of what it learned: {picture}\nreport: {page}\nrun: {run}")


def paint(run: Path, data: Path, sidecar: Path, path: Path) -> Path:
    """The picture of a run's evaluations on some shards."""
    opened = load(run)
    recipe = opened.recipe
    recipe.module().eval()
    found = {type(one): one for one in recipe.evaluations}
    units = open_units(recipe.stages[-1], [str(data)], str(sidecar))
    title = f"{opened.record['recipe']['name']}, {opened.checkpoint.step} steps, collages it was not trained on"
    return draw(
        path, units, found[Grounding], found[Reading], found[PairRetrieval], Processes.start(), title=title,
        credit=CREDIT,
    )  # fmt: skip
