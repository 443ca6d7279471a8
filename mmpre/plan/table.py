"""A plan, in lines for people."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmpre.plan import PlanOptions, legal_worlds

WAYS = {"alone": "one GPU", "ddp": "each GPU, DDP", "fsdp": "each GPU, FSDP2"}


def lines(told: Mapping[str, Any], options: PlanOptions) -> Iterator[str]:
    """The plan line by line; on CPUs what is said of GPUs holds for processes."""
    for line in _lines(told, options):
        yield line if options.device == "cuda" else line.replace("GPUs", "processes").replace("GPU", "process")


def _lines(told: Mapping[str, Any], options: PlanOptions) -> Iterator[str]:
    parameters = told["parameters"]
    scale = f", scale {told['scale']}" if told["scale"] else ""
    yield f"{told['recipe']}{scale}, {_gpus(told['gpus'])}, {told['precision']}"
    yield f"parameters {parameters['total']:,} ({parameters['without_tables']:,} without tables of embeddings)"
    for part, count in parameters["parts"].items():
        yield f"  {part:<24} {count:>16,}"
    for number, stage in enumerate(told["stages"]):
        yield from _stage(number if len(told["stages"]) > 1 else None, stage, options)
    worlds = ", ".join(map(str, legal_worlds(told["stages"])))
    yield f"a step can be shared by {worlds} GPUs (what divides the micro-batches)"


def _stage(number: int | None, stage: Mapping[str, Any], options: PlanOptions) -> Iterator[str]:
    yield f"stage {number}:" if number is not None else "a step:"
    yield f"  {stage['batch']:,} rows in {stage['micro_batches']} micro-batches; rows are {stage['rows_are']}"
    yield f"  {stage['tokens']:,.0f} tokens, {stage['seen']:,.0f} of them read by the encoder"
    yield f"  {_si(stage['flops'])}FLOP forward and backward, {_si(stage['flops_of_a_token'])}FLOP a token"
    for name, task in stage["tasks"].items() if len(stage["tasks"]) > 1 else ():
        yield f"    task {name:<12} {_si(task['flops'])}FLOP, activations {_si(task['activations'])}B"
    for way, held in stage["memory"].items():
        fits = "" if "fits" not in stage else f": {'fits' if stage['fits'][way] else 'does not fit'}"
        parts = ", ".join(f"{name} {_si(size)}B" for name, size in held.items())
        yield f"  memory of {WAYS[way]} {_si(sum(held.values()))}B{fits} ({parts})"
    if not all(stage.get("fits", {}).values()):
        yield f"  {_advice(stage, options)}"
    if "seconds" in stage:
        yield (
            f"  {stage['seconds_of_a_step']:.3g} s at {options.utilisation:.0%} of {_si(options.flops)}FLOP/s a GPU "
            f"(stated, not measured)"
        )
    yield f"all of it: {stage['steps']:,} steps, {stage['rows']:,} rows, {_si(stage['tokens_in_all'])}tokens"
    if "data" in stage:
        data = stage["data"]
        shards = f" in {data['shards']:,} shards" if data["shards"] else ""
        yield (
            f"  {data['rows_of_an_epoch']:,} rows of an epoch{shards}: {data['steps_of_an_epoch']:,.1f} steps each, "
            f"{data['epochs']:,.2f} epochs"
        )
    if "seconds" in stage:
        yield f"  {stage['seconds'] / 3600:,.1f} hours, {stage['seconds'] * options.gpus / 3600:,.1f} GPU hours"


def _advice(stage: Mapping[str, Any], options: PlanOptions) -> str:
    """The fewest micro-batches with which it would fit, activations being in proportion to their rows."""
    for held in sorted(stage["memory"].values(), key=lambda held: sum(held.values()) - held["activations"]):
        room = options.gpu_memory * 1e9 - (sum(held.values()) - held["activations"])
        if room <= 0:
            continue
        wanted = stage["micro_batches"] * held["activations"] / room
        count = options.gpus * -(-int(wanted + 1) // options.gpus)
        if count <= stage["batch"] and count > stage["micro_batches"]:
            return f"it would fit with about {count} micro-batches (a number of the recipe)"
    return "more micro-batches do not help where it does not fit: take more GPUs, or a smaller network"


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _si(value: float) -> str:
    units = ["", "k", "M", "G", "T", "P", "E"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:,.0f} {units[0]}" if value >= 100 else f"{value:.3g} {units[0]}"
