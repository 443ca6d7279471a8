"""Motion of the wrist, from a watch: acceleration and rotation, six numbers 50 times a second. All of it in this file.
mmpre data build ./wrist_motion.py --fetch --out shards
mmpre train ./wrist_motion.py --data shards/train --valid shards/valid --out run
mmpre eval run
Data: package `seglearn` (BSD), 140 recordings of 7 shoulder exercises by 10 people; nobody stands in two splits.
"""

import io
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from mmpre import Recipe, Stage, Task, View
from mmpre.data.sample import BadMember
from mmpre.data.shards import shard_writer
from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.packages import Pip, unpacked
from mmpre.encoder import vit_encoder
from mmpre.heads.pixels import Pixels
from mmpre.masking.corrupt import HideAll
from mmpre.masking.spans import StartedSpans
from mmpre.network import Network
from mmpre.objectives.one_pass import OnePass, Predict
from mmpre.schedules import Cosine
from mmpre.tokens import Tokens
from mmpre.training.optim import AdamW

description, licence, size = "shoulder exercises, from a watch", "BSD", "11 MB"
CHANNELS, WINDOW, SPLITS = 6, 256, {"train": range(1, 8), "valid": [8], "test": [9, 10]}  # numbers of people
ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype", "_codecs.encode")


class NumbersOnly(pickle.Unpickler):  # a pickle may run code, unless nothing but arrays may come out of it
    def find_class(self, module, name):
        if f"{module}.{name}".replace("._core.", ".core.") not in ARRAYS:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in this file")
        return super().find_class(module, name)


def build(out: Path, *, source: Path | None = None, fetch: bool = False) -> Path:  # 5 s as npy, the exercise as cls
    with unpacked(Pip("seglearn", "1.2.5", "seglearn"), source=source, fetch=fetch) as (got,):
        file = io.BytesIO((got.folder / "data/watch_dataset.npy").read_bytes())
    np.lib.format.read_magic(file), np.lib.format.read_array_header_1_0(file)
    watch = NumbersOnly(file, encoding="latin1").load().item()
    counts = Counter()
    for split, people in SPLITS.items():
        with shard_writer(out / split, prefix=split) as sink:
            for i in np.flatnonzero(np.isin(watch["subject"], people)):
                for start in range(0, len(watch["X"][i]) - WINDOW + 1, WINDOW // 2):
                    np.save(data := io.BytesIO(), watch["X"][i][start : start + WINDOW].astype(np.float32))
                    sink.write({"__key__": f"{i}-{start}", "npy": data.getvalue(), "cls": str(watch["y"][i])})
                    counts[split] += 1
    task = EvalTask(kind="classification", about="the exercise, of 7", input="npy", target="cls")  # for mmpre eval
    rule = "by person: 1 to 7 train, 8 valid, 9 and 10 test"
    write_card(out, name="wrist", licence=licence, sources=[got], counts=counts, split_rule=rule, tasks=[task])
    return out


class MotionReader:
    suffixes = ("npy",)

    def tokenize(self, sample, draw):
        member, data = sample.bytes(self.suffixes)
        try:
            series_TC = torch.tensor(np.load(io.BytesIO(data), allow_pickle=False)[:WINDOW], dtype=torch.float32)
            if series_TC.shape[1:] != (CHANNELS,):
                raise ValueError(f"got {list(series_TC.shape)}")
            piece_nE = series_TC.reshape(-1, 8 * CHANNELS)
        except Exception as e:  # of numpy's own choice
            raise BadMember("not an array", member, f"wanted [8 n, {CHANNELS}] numbers as .npy ({e})") from None
        if not len(piece_nE) or not piece_nE.isfinite().all():
            raise BadMember("not motion", member, "there is nothing in it, or what is no number")
        return Tokens.of_row(torch.full(piece_nE.shape[:1], -1), piece=piece_nE, position=torch.arange(len(piece_nE)))


def plain_reader(sample):
    """A reader of ordinary settings, for `mmpre data inspect --modality ./wrist_motion.py`."""
    return MotionReader()


class Motion(torch.nn.Module):  # eight samples are a token, 0.16 s
    def __init__(self, width: int) -> None:
        super().__init__()
        self.reader = MotionReader()
        self.project, self.position = torch.nn.Linear(8 * CHANNELS, width), torch.nn.Embedding(WINDOW // 8, width)
        self.mask_D = torch.nn.Parameter(torch.randn(width) * 0.02)

    def features(self, tokens):
        return tokens["piece"]

    def embed(self, f_NE, tokens, replaced_N):
        return torch.where(replaced_N[:, None], self.mask_D, self.project(f_NE)) + self.position(tokens["position"])


def wrist_motion(
    data: tuple[str, ...] = (),  # shards to train on
    valid: tuple[str, ...] = (),  # held-out shards
    width: int = 64,  # of the states
    steps: int = 400,  # updates
) -> Recipe:
    network = Network({"motion": Motion(width)}, vit_encoder(width, 3, 4))
    view = View(picks={"hidden": StartedSpans(role="motion", chance=0.1, length=8)}, corruption=HideAll())
    head = Pixels(width, 8 * CHANNELS, network.modalities["motion"].features, normalise=False)
    task = Task("motion", view, OnePass(network, [Predict("hidden", head)]))
    optimizer = AdamW(lr=3e-3, weight_decay=0.05, schedule=Cosine(warmup=steps // 10, total=steps))
    stage = Stage(tasks=[task], data=data, valid=valid, steps=steps, batch=64, optimizer=optimizer)
    return Recipe([stage], network)
