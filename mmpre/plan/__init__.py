"""`mmpre plan`: what a recipe will take, before there is data or a GPU.

Parameters are counted; FLOPs and memory are found by running each task's largest part of a step on the meta device
(trace.py), on rows of the recipe's data where it names some and otherwise on made rows that are as long as rows
get. What is kept for a while by kernels, allocators and other processes' messages is not in it.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmpre.batch import Batch, Views
from mmpre.data.loader import MicroBatch, MicroBatches, Slot, check_world
from mmpre.data.mixture import Mixture
from mmpre.data.shards import shard_writer
from mmpre.draw import Draw
from mmpre.objectives.protocol import InBatch
from mmpre.plan.trace import FULL, trace, without_weights
from mmpre.plugins import find_recipe
from mmpre.recipe import Recipe, Stage, Task
from mmpre.runs.run import build, open_sources, open_units
from mmpre.training.sharded import blocks_alone

MADE = 16  # samples, each drawn anew as often as it is taken


class PlanError(ValueError):
    """A plan that cannot be made as asked."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What a plan is made for."""

    gpus: int = 1  # processes that share a step, one a device
    device: str = "cuda"  # what these are: cuda, or cpu, where attention keeps more (trace.py)
    gpu_memory: float | None = None  # of each, in GB (1e9 bytes): whether it fits is told
    samples: int | None = None  # rows of an epoch, where no data is named
    precision: str = "fp32"  # fp32, or bf16 for autocast
    flops: float | None = None  # of a device in a second, at this precision, as its maker says (312e12): time is told
    utilisation: float = 0.4  # share of these that is reached

    def __post_init__(self) -> None:
        problems = []
        if self.precision not in ("fp32", "bf16"):
            problems.append(f"precision must be fp32 or bf16, got {self.precision!r}")
        if self.device not in FULL:
            problems.append(f"device must be {' or '.join(FULL)}, got {self.device!r}")
        if not 0 < self.utilisation <= 1:
            problems.append(f"utilisation is a share, above 0 and at most 1; got {self.utilisation}")
        for name in ("gpus", "gpu_memory", "samples", "flops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                problems.append(f"{name} must be above 0, got {value}")
        if problems:
            raise PlanError("plan: " + "; ".join(problems))


def plan(
    recipe: str | Path | Callable[..., Recipe], *, scale: str | None = None, options: PlanOptions | None = None,
    **numbers: Any,
) -> dict[str, Any]:  # fmt: skip
    """What a recipe's stages take: parameters, FLOPs, memory of each GPU in bytes, tokens, epochs, seconds.

    Memory is that of a step at its peak, by what holds it: alone, or under DDP and FSDP2 where there are several GPUs.
    Raises PlanError, or what says itself why the recipe cannot be built or its step not be run without numbers.
    """
    options, found = options or PlanOptions(), find_recipe(recipe)
    chosen = found.numbers(scale, numbers)
    with without_weights():
        made = build(found, chosen, 0)
    for stage in made.stages:
        check_world(stage.micro_batches, options.gpus)
    module = made.module().to("meta").train()
    return {
        "recipe": found.name, "scale": scale, "gpus": options.gpus, "precision": options.precision,
        "parameters": _parameters(module),
        "stages": [_stage(made, number, module, options) for number in range(len(made.stages))],
    }  # fmt: skip


def _parameters(module: nn.ModuleDict) -> dict[str, Any]:
    """Numbers of parameters, a shared one where it comes first."""
    parts: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        first, second, third, *_ = [*name.split("."), "", ""]
        if first == "network":
            part = "encoder" if second == "encoder" else f"modality {third}" if second == "modalities" else first
        else:
            part = f"task {second}" if first == "tasks" else first
        parts[part] = parts.get(part, 0) + parameter.numel()
    tables = {id(m.weight): m.weight.numel() for m in module.modules() if isinstance(m, nn.Embedding)}
    total = sum(parts.values())
    return {"total": total, "without_tables": total - sum(tables.values()), "parts": parts}


def _stage(recipe: Recipe, number: int, module: nn.ModuleDict, options: PlanOptions) -> dict[str, Any]:
    stage = recipe.stages[number]
    recipe.set_trained(number)
    first, last = stage.batch_at(0)[0], stage.batch_at(stage.steps)[0]
    told: dict[str, Any] = {
        "steps": stage.steps, "batch": stage.batch, "micro_batches": stage.micro_batches, "rows": last - first,
        "micro_batches_of_each_gpu": stage.micro_batches // options.gpus, "tasks": {},
    }  # fmt: skip
    with _data(stage, number) as (mixture, real):
        told["rows_are"] = "the data's" if real else "made up, as long as rows get"
        source = MicroBatches.of(stage, mixture, seed=0, number=number)
        for task in stage.tasks:
            told["tasks"][task.name] = _task(stage, task, source, module, options)
        units = len(mixture) if real else options.samples
        shards = sum(len(part.shards.indexes) for part in mixture.parts) if real else None
    ratio = sum(task.ratio for task in stage.tasks)
    for name in ("flops", "tokens", "seen"):
        told[name] = sum(task.ratio * told["tasks"][task.name][name] for task in stage.tasks) / ratio
    told["flops_of_a_token"] = told["flops"] / max(1, told["tokens"])
    told["tokens_in_all"] = told["tokens"] * told["rows"] / stage.batch
    told["flops_in_all"] = told["flops"] * told["rows"] / stage.batch  # fewer than of so many full steps on a ramp
    if units is not None:
        told["data"] = {"shards": shards, "rows_of_an_epoch": units, "steps_of_an_epoch": units / stage.batch,
                        "epochs": told["rows"] / units}  # fmt: skip
        if real:
            mixture.check(stage.batch)
    told["memory"] = _memory(stage, module, told["tasks"], options)
    if options.gpu_memory is not None:
        told["fits"] = {way: sum(held.values()) <= options.gpu_memory * 1e9 for way, held in told["memory"].items()}
    if options.flops is not None:
        told["seconds_of_a_step"] = told["flops"] / (options.gpus * options.flops * options.utilisation)
        told["seconds"] = told["seconds_of_a_step"] * told["rows"] / stage.batch
    return told


def _task(
    stage: Stage, task: Task, source: MicroBatches, module: nn.ModuleDict, options: PlanOptions
) -> dict[str, Any]:
    """FLOPs of a whole step, tokens of it, and the bytes that the largest part makes at its peak."""
    start, size = 0, stage.batch
    made: MicroBatch = source[Slot(0, 0, task.name, start, size)]
    if not made.parts:
        raise PlanError(
            f"plan: no row of task {task.name} can be read, the first because of {made.holes[0].cause} "
            f"({made.holes[0].detail}); look at the shards with `mmpre data inspect`"
        )
    part = max(made.parts, key=lambda one: one.counts["tokens"])
    rows, batch = part.counts["rows"], part.to("meta")
    step = _step(task.objective, batch, rows=size)
    module.zero_grad()
    again = stage.micro_batches // options.gpus > 1 or len(made.parts) > 1
    how = dict(bf16=options.precision == "bf16", device=options.device)
    try:
        if again:  # its gradients are there while the next part runs
            trace(step, [*module.parameters(), *module.buffers()], **how)
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        flops, peak = trace(step, [*module.parameters(), *module.buffers(), *grads], **how)
    except (RuntimeError, NotImplementedError) as e:
        first = str(e).strip().split("\n")[0]
        raise PlanError(
            f"plan: task {task.name} cannot be run on shapes alone: {first}; what its objective does depends on values "
            "on the device. Measure a short run instead"
        ) from e
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.grad is not None)
    module.zero_grad()
    every = {name: sum(one.counts[name] for one in made.parts) for name in ("rows", "tokens")}
    clean = sum(_clean(one) for one in made.parts)
    share = size / every["rows"]  # a step is so many times as large as what was made of it
    return {
        "flops": flops * every["tokens"] / part.counts["tokens"] * share, "tokens": clean * share,
        "seen": every["tokens"] * share, "rows_at_once": rows, "tokens_at_once": part.counts["tokens"],
        "activations": max(0, peak - (0 if again else trained)),
    }  # fmt: skip


def _step(objective: nn.Module, batch: Batch | Views, *, rows: int) -> Callable[[], None]:
    """Forward and backward of a part, as the training loop does them; `rows` are those of a whole step."""
    draw = Draw.micro_batch(0, 0, 0, 0)

    def step() -> None:
        if not isinstance(objective, InBatch):
            objective(batch, draw).total(batch.counts).backward()
            return
        with torch.no_grad():
            features = objective.features(batch, draw)
        times, own = -(-rows // batch.counts["rows"]), batch.counts["rows"]
        leaves = [{n: x.float().clone().requires_grad_() for n, x in features.items()} for _ in range(times)]
        joined = {name: torch.cat([one[name] for one in leaves]) for name in features}
        objective.loss(joined, [own] * times).total(batch.counts).backward()
        features = objective.features(batch, draw)
        torch.autograd.backward(list(features.values()), [leaves[0][n].grad.to(x.dtype) for n, x in features.items()])

    return step


def _clean(part: Batch | Views) -> int:
    batches = [part] if isinstance(part, Batch) else list(part.views.values())
    return sum(len(tokens) for batch in batches for tokens in batch.clean.values())


def _memory(
    stage: Stage, module: nn.ModuleDict, tasks: Mapping[str, Mapping[str, Any]], options: PlanOptions
) -> dict[str, dict[str, int]]:
    """Bytes of each GPU, by what holds them, for each way to share a step."""
    whole = _held(stage, module, 1)
    gradients = whole["gradients"]
    whole["activations"] = max(task["activations"] for task in tasks.values())
    if options.gpus == 1:
        return {"alone": whole}
    blocks = [sum(_bytes(p) for p in block.parameters()) for block in blocks_alone(module)]
    rest = sum(_bytes(p) for p in module.parameters()) - sum(blocks)
    two = sum(sorted(blocks)[-2:])  # one is gathered while another computes
    shared = _held(stage, module, options.gpus) | {
        "activations": whole["activations"], "gathered": 2 * (rest + two),  # weights, and their gradients
    }  # fmt: skip
    if stage.micro_batches > options.gpus:  # whole gradients are added up until a step's last part shares them out
        shared["unshared"] = max(0, gradients - rest - two)
    return {"ddp": whole | {"buckets": gradients}, "fsdp": shared}


def _held(stage: Stage, module: nn.ModuleDict, gpus: int) -> dict[str, int]:
    """Bytes of parameters, gradients and moments of the first GPU where so many share them, 1 for whole ones.

    Each parameter is cut along its first dimension, into parts of equal size but for the last; single numbers and
    buffers are whole everywhere.
    """

    def part(p: torch.Tensor) -> int:
        return _bytes(p) if p.ndim == 0 else _bytes(p) * -(-len(p) // gpus) // max(1, len(p))

    parameters = sum(map(part, module.parameters())) + sum(map(_bytes, module.buffers()))
    return {
        "parameters": parameters, "gradients": sum(part(p) for p in module.parameters() if p.requires_grad),
        "moments": _moments(stage, module, part),
    }  # fmt: skip


def _moments(stage: Stage, module: nn.ModuleDict, part: Callable[[torch.Tensor], int]) -> int:
    """Bytes of the optimizer's state, learned from the optimizer itself on small parameters of the same names; `part`
    says how many bytes of a parameter are held."""
    small = {n: nn.Parameter(torch.zeros([2] * p.ndim)) for n, p in module.named_parameters() if p.requires_grad}
    optimizer = stage.optimizer.build(small.items())
    for parameter in small.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    total = 0
    for name, parameter in module.named_parameters():
        for value in optimizer.state[small[name]].values() if name in small else ():
            if isinstance(value, torch.Tensor):
                whole = value.shape != small[name].shape
                times = value.numel() if whole else part(parameter) // parameter.element_size()
                total += times * value.element_size()
    return total


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _data(stage: Stage, number: int) -> Iterator[tuple[Mixture, bool]]:
    """The stage's data, where it names some, or shards of made samples that are gone afterwards; which of the two."""
    if stage.data:
        yield open_sources(stage), True
        return
    members: dict[str, bytes] = {}
    for reader in [reader for task in stage.tasks for reader in task.readers]:
        if not hasattr(reader, "made"):
            raise PlanError(
                f"plan: {type(reader).__name__} cannot make up a sample (made); name some shards by --data, or add "
                "that method to it"
            )
        members |= reader.made()
    with tempfile.TemporaryDirectory() as folder:
        with shard_writer(Path(folder) / "made") as sink:
            for i in range(MADE):
                sink.write({"__key__": f"made{i:02d}", **members})
        logger, level = logging.getLogger("mmpre.data"), logging.getLogger("mmpre.data").level
        logger.setLevel(logging.WARNING)  # what is done with them is nobody's business
        try:
            yield Mixture.of(open_units(stage, [str(path) for path in sink.paths], None)), False
        finally:
            logger.setLevel(level)


def legal_worlds(stages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Numbers of GPUs that can share every stage's micro-batches."""
    most = min(stage["micro_batches"] for stage in stages)
    return [w for w in range(1, most + 1) if all(stage["micro_batches"] % w == 0 for stage in stages)]
