"""A run of seconds, for lines that damage its files."""

from pathlib import Path

from test_shard_faults import notes, write

import mmpre
from mmpre.runs.options import RunOptions

TONES = Path(__file__).parent.parent / "tones.py"


def short_run(folder: Path) -> Path:
    paths = write(folder / "shards", notes(64), prefix="train")
    options = RunOptions(workers=0, exact=True)
    return mmpre.train(TONES, out=folder / "run", data=paths, steps=6, options=options)
