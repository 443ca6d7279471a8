"""`mmpre new-modality NAME`: a modality of one's own to start from, in one file that runs, and its test."""

import ast
import builtins
import keyword
import sys
from pathlib import Path

MODULE = '''\
"""Ripples: one number a sample, as `npy`. Each place to change says CHANGE.

    mmpre train ./ripples.py --data shards/train --valid shards/valid --out run
"""
# N tokens of the packed batch, n of one row, T samples, E numbers of a token, M hidden tokens, D width

import io
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from mmpre import Recipe, Stage, Task, View
from mmpre.data.sample import BadMember
from mmpre.encoder import vit_encoder
from mmpre.masking.corrupt import HideAll
from mmpre.masking.random import RandomTokens
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.schedules import Cosine
from mmpre.tokens import Tokens
from mmpre.training.optim import AdamW


@dataclass(frozen=True)
class RipplesReader:
    """Makes tokens of a sample's members, in loading workers. CHANGE: which members, and what a token is.

    Whatever is wrong with a member must become BadMember: it costs that sample alone and is counted. Randomness (crops,
    noise) comes from the draw: `draw.rng("crop")`.
    """

    piece: int = 8  # samples in a token
    most: int = 64  # tokens in a row
    suffixes: tuple[str, ...] = ("npy",)

    def tokenize(self, sample, draw):
        member, data = sample.bytes(self.suffixes)
        try:
            values_T = np.load(io.BytesIO(data), allow_pickle=False).astype(np.float32)
        except Exception as e:  # of numpy's own choice
            raise BadMember("not an array", member, f"wanted numbers as .npy ({e})") from None
        count = min(len(values_T) // self.piece, self.most) if values_T.ndim == 1 else 0
        if not count or not np.isfinite(values_T).all():
            raise BadMember("not ripples", member, f"wanted {self.piece} or more finite numbers")
        piece_nE = torch.from_numpy(values_T[: count * self.piece].reshape(count, self.piece))
        # below 0: an ordinary token; 0, 1 ...: kinds of special ones such as [CLS], which masks never pick
        special_n = torch.full((count,), -1)
        return Tokens.of_row(special_n, piece=piece_nE, position=torch.arange(count))


def plain_reader(sample):
    """A reader of ordinary settings, for `mmpre data inspect --modality ./ripples.py`."""
    return RipplesReader()


class Ripples(nn.Module):
    """Turns tokens into vectors for the encoder. CHANGE: the projection and the positions.

    Rows lie end to end in a batch, so nothing here may reach from one token to another of another row.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reader = RipplesReader()
        self.project = nn.Linear(self.reader.piece, width)
        self.position = nn.Embedding(self.reader.most, width)
        self.mask_D = nn.Parameter(torch.randn(width) * 0.02)

    def features(self, tokens):
        """What targets are read from as well: clean values, before anything is hidden."""
        return tokens["piece"]

    def embed(self, f_NE, tokens, replaced_N):
        """A replaced token must not show what it replaces; where it stands it may show."""
        x_ND = torch.where(replaced_N[:, None], self.mask_D, self.project(f_NE))
        return x_ND + self.position(tokens["position"])


class HiddenRipples(nn.Module):
    """Squared error of a hidden token's values. CHANGE: what is predicted."""

    def __init__(self, width: int, piece: int) -> None:
        super().__init__()
        self.out = nn.Linear(width, piece)

    def forward(self, state_MD, tokens, index_M):
        return (self.out(state_MD) - tokens["piece"][index_M]).square().mean(1)

    def measured(self, state_MD, tokens, index_M):
        """The losses, and by name what else is worth logging of each token."""
        return self(state_MD, tokens, index_M), {}


def ripples(
    data: tuple[str, ...] = (),  # shards to train on
    valid: tuple[str, ...] = (),  # held-out shards
    width: int = 64,  # of the states
    depth: int = 3,  # layers
    hide: float = 0.5,  # chance of a token to be predicted
    steps: int = 1_000,  # updates
    batch: int = 32,  # rows in a step
    lr: float = 1e-3,  # at its peak
) -> Recipe:
    module = Ripples(width)
    network = Network({"ripples": module}, vit_encoder(width, depth, 4))
    view = View(picks={"hidden": RandomTokens(role="ripples", rate=hide)}, corruption=HideAll())
    head = HiddenRipples(width, module.reader.piece)
    task = Task("ripples", view, OnePass(network, [Predict("hidden", head)]))
    optimizer = AdamW(lr=lr, schedule=Cosine(warmup=steps // 10, total=steps))
    return Recipe([Stage(tasks=[task], data=data, valid=valid, steps=steps, batch=batch, optimizer=optimizer)], network)
'''

TEST = '''\
"""Ripples keep to what mmpre asks of a modality, and a network learns from them. Run: pytest test_ripples.py"""

import io
from pathlib import Path

import numpy as np
import ripples as mine

import mmpre
from mmpre.data.sample import Sample
from mmpre.data.shards import shard_writer
from mmpre.evaluation.evaluate import evaluate
from mmpre.testing import check_modality


def member(seed):
    """A file as the reader wants it. CHANGE: real ones, small."""
    rng, data = np.random.default_rng(seed), io.BytesIO()
    time = np.arange(rng.integers(40, 300))
    np.save(data, np.sin(rng.uniform(0.1, 0.3) * time + rng.uniform(0, 6)).astype(np.float32))
    return data.getvalue()


def test_it_keeps_the_contract():
    samples = [Sample(f"{seed}", "shard", "digest", {"npy": member(seed)}) for seed in range(3)]
    check_modality(mine.Ripples(width=16), samples, visible=("position",))


def test_a_network_learns_from_it(tmp_path):
    for split, seeds in (("train", range(200)), ("valid", range(200, 240))):
        with shard_writer(tmp_path / split, prefix=split) as sink:
            for seed in seeds:
                sink.write({"__key__": f"{seed:03d}", "npy": member(seed)})
    shards = {split: (str(tmp_path / split),) for split in ("train", "valid")}
    run = mmpre.train(Path(mine.__file__), out=tmp_path / "run", data=shards["train"], valid=shards["valid"],
                      width=32, depth=2, steps=60, batch=16, lr=5e-3)  # fmt: skip
    answer = evaluate(run)
    assert answer["trained"]["tasks"]["ripples"]["loss"] < 0.7 * answer["untrained"]["tasks"]["ripples"]["loss"]
'''

NEXT = """wrote {module} and {test}; next:

  pytest {test}        both tests pass as they are
  grep CHANGE {module}
  mmpre data pack FOLDER --out shards    (files of the same name are one sample)
  mmpre data inspect shards --modality ./{module}    (a picture of what a mask hides)
  mmpre train ./{module} --data shards --out run"""


def new_modality(name: str, folder: Path = Path()) -> tuple[Path, Path]:
    """Write NAME.py and test_NAME.py into a folder.

    Raises ValueError for a name that is none in Python or is taken, FileExistsError where a file is there already.
    """
    if not name.isidentifier() or name != name.lower() or keyword.iskeyword(name) or name.startswith("_"):
        raise ValueError(
            f"new-modality: the name must be one of a Python module, in lower case, such as wrist_motion; got {name!r}"
        )
    title = "".join(part.capitalize() for part in name.split("_"))
    if taken := {name, title} & _taken():
        raise ValueError(
            f"new-modality: the name must not be one that the file imports or that Python has, got {name!r} "
            f"({', '.join(sorted(taken))} is such); add a word, such as my_{name}"
        )
    module, test = folder / f"{name}.py", folder / f"test_{name}.py"
    for path in (module, test):
        if path.exists():
            raise FileExistsError(f"new-modality: {path} is there already; name another one, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in ((module, MODULE), (test, TEST)):
        path.write_text(text.replace("ripples", name).replace("Ripples", title), encoding="utf-8")
    return module, test


def _taken() -> set[str]:
    """Names that mean something else to the module: what it imports, what it uses of Python's, Python's modules."""
    nodes = list(ast.walk(ast.parse(MODULE)))
    used = {node.id for node in nodes if isinstance(node, ast.Name)} & set(dir(builtins))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    bound = {alias.asname or alias.name for node in imports for alias in node.names}
    homes = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    return used | bound | homes | {"mmpre"} | sys.stdlib_module_names
