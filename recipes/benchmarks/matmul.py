"""How much of the machine's own matmul rate a whole training step of BERT 12 x 768 reaches.

    step      mmpre: loading, forward, backward, clipping and update
    matmuls   nothing but the matrix products of the same steps, one after the other: the shapes of every linear map
              (forward, and both products of its backward pass) and of attention, in the same precision

Both count the same floating-point operations, from the layout of the batches: two for each multiplication in linear
maps and attention, forward and backward. Lookups, norms, softmax and the optimizer count as nothing, but take time, so
"faster by 0.85" means that a step reaches 85 percent of what the machine can. A step has 64 rows of up to 256 pieces,
in two micro-batches; the paper's has 256 rows, which makes the optimizer's share smaller yet.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mmpre.batch import Batch
from mmpre.benchmark import Comparison, Settings, Turn
from mmpre.data.loader import load, slots
from mmpre.recipes.benchmarks import bert
from mmpre.recipes.benchmarks.bert import Case
from mmpre.recipes.benchmarks.harness import peak_bytes, serve, take_turns, timed
from mmpre.recipes.benchmarks.texts import find_texts, tokenizer_of

description = "the share of the machine's own matmul rate that a training step of BERT 12 x 768 reaches"

VOCAB = 30_522
GIGA = 1e9


@dataclass(frozen=True)
class Product:
    """[rows, inner] times [inner, columns], `batch` of them at once, `times` times."""

    rows: int
    inner: int
    columns: int
    batch: int = 1
    times: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.inner * self.columns * self.batch * self.times

    def backward(self) -> "list[Product]":
        """The two products of its backward pass: of what came in, and of what it was multiplied by."""
        return [
            Product(self.rows, self.columns, self.inner, self.batch, self.times),
            Product(self.inner, self.rows, self.columns, self.batch, self.times),
        ]


def products(batch: Batch, case: Case, vocab: int) -> list[Product]:
    """Every matrix product of a step on one batch, forward and backward."""
    everyone, picked, D = batch.layout.size, len(batch.picked["word"]), case.width
    layers = [(everyone, case.depth - 1), (picked, 1)]  # the last layer goes on at picked tokens only
    forward = [Product(everyone, D, 3 * D, times=case.depth)]
    for rows, times in layers:
        forward += [Product(rows, D, D, times=times), Product(rows, D, 4 * D, times=times)]
        forward += [Product(rows, 4 * D, D, times=times)]
    for rows, length, _ in batch.plan.groups:
        heads, K = rows * case.heads, D // case.heads
        forward += [Product(length, K, length, heads, case.depth), Product(length, length, K, heads, case.depth)]
    forward += [Product(picked, D, D), Product(picked, D, vocab)]
    return forward + [product for one in forward for product in one.backward()]


def run(settings: Settings) -> Iterator[Comparison]:
    with TemporaryDirectory(prefix="mmpre-bench-") as folder:
        data = find_texts(settings)[0]
        for precision in ("float32", "bfloat16"):
            title = f"{data.name}, 12 x 768, {precision}"
            if settings.cases not in title:
                continue
            case = Case(
                data=str(data / "train"), tokenizer=str(tokenizer_of(data, VOCAB, Path(folder))), width=768, depth=12,
                bf16=precision == "bfloat16", dropout=0.0, steps=settings.steps or 3, warmup=1, batch=64,
                micro_batches=2,
            )  # fmt: skip
            turns = take_turns(__spec__.name, list(CONTENDERS), asdict(case), settings, title)
            about = {name: value for name, value in asdict(case).items() if name not in ("data", "tokenizer")}
            yield Comparison(title=title, unit="GFLOP", turns=turns, about=about)


def step(**numbers: object) -> Turn:
    case = Case(**numbers)
    todo = todo_of(case)
    with closing(bert.training(case)) as steps:
        amounts = (sum(product.flops for product in one) / GIGA for one, _ in zip(todo, steps, strict=True))
        return timed(amounts, warmup=case.warmup, count=case.steps)


def todo_of(case: Case) -> list[list[Product]]:
    """The products of each step."""
    recipe = bert.recipe_of(case)
    vocab = recipe.network.readers["text"].vocabulary.size
    order = slots(recipe.stages[0], 0, 0, case.warmup + case.steps, 0, 1)
    with closing(load(bert.source_of(case, recipe), order, workers=0)) as made:
        steps: dict[int, list[Product]] = {}
        for one in made:
            found = [product for part in one.parts for product in products(part, case, vocab)]
            steps.setdefault(one.slot.step, []).extend(found)
    return list(steps.values())


@torch.no_grad()
def matmuls(**numbers: object) -> Turn:
    case = Case(**numbers)
    kind = torch.bfloat16 if case.bf16 else torch.float32
    todo = todo_of(case)
    _multiply(todo[0], kind)
    seconds = sum(_multiply(one, kind) for one in todo[case.warmup :])
    amount = sum(product.flops for one in todo[case.warmup :] for product in one) / GIGA
    return Turn(amount, seconds, peak_bytes())


def _multiply(some: Iterable[Product], kind: torch.dtype) -> float:
    """Carry out products; returns the seconds that they took, without making what is multiplied."""
    seconds = 0.0
    for one in some:
        several = [one.batch] if one.batch > 1 else []
        left = torch.randn(*several, one.rows, one.inner).to(kind)
        right = torch.randn(*several, one.inner, one.columns).to(kind)
        out = left @ right  # memory is touched, and kernels made
        begun = time.perf_counter()
        for _ in range(one.times):
            torch.matmul(left, right, out=out)
        seconds += time.perf_counter() - begun
    return seconds


CONTENDERS = {"step": step, "matmuls": matmuls}

if __name__ == "__main__":
    serve(CONTENDERS)
