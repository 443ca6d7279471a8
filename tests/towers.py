"""A recipe of two towers, pictures and texts, small enough for tests."""

from mmpre.encoder import bert_encoder
from mmpre.heads.pool import Mean, Tower
from mmpre.modalities.image_patches import ImagePatches, ImageReader
from mmpre.modalities.text import Text, TextReader
from mmpre.network import Network
from mmpre.objectives.contrast import Contrast, InfoNCE
from mmpre.recipe import Recipe, Stage, Task
from mmpre.schedules import Linear
from mmpre.training.optim import AdamW
from mmpre.view import View


def towers(data: tuple[str, ...] = (), valid: tuple[str, ...] = (), width: int = 16, steps: int = 4) -> Recipe:
    parts = {"text": Text(TextReader(max_length=24), width=width), "image": ImagePatches(ImageReader(16), width=width)}
    both = {role: Tower(Network({role: part}, bert_encoder(width, 1, 2)), Mean(role)) for role, part in parts.items()}
    task = Task("pairs", {role: View(roles=(role,)) for role in both}, Contrast(both, InfoNCE(0.1)))
    optimizer = AdamW(lr=1e-3, schedule=Linear(warmup=1, total=steps))
    stage = Stage(tasks=[task], data=data, valid=valid, steps=steps, batch=8, optimizer=optimizer)
    return Recipe([stage], both["image"].net)
