"""How a run is carried out, whatever the recipe."""

from dataclasses import dataclass, fields

from mmpre.runs.loggers import unknown
from mmpre.values import problems as value_problems

KINDS = ("auto", "sum", "ddp", "fsdp")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is carried out, whatever the recipe.

    Of these, only `seed`, `init`, `precision`, `spike` and `exact` change results, and in exact mode `threads`: a sum
    that is split over more threads is rounded otherwise. Without exact mode, `threads`, `parallel`, `compile` and the
    number of processes change how sums are rounded.
    """

    seed: int = 0  # of the data order, masks, initial weights and dropout
    init: str | None = None  # folder to start the network from: of transformers, timm (safetensors), or a run
    precision: str = "fp32"  # fp32, or bf16 for autocast
    exact: bool = False  # add gradients in float64: bit-equal results for any number of processes
    compile: bool = False  # feed-forwards and heads by torch.compile: the same losses but for rounding
    parallel: str = "auto"  # how processes join gradients: sum, ddp, fsdp (shares parameters out), auto (ddp on CUDA)
    workers: int | None = None  # loading processes; by default what the machine's cores allow
    threads: int | None = None  # of each process's arithmetic; by default torch's own choice, 1 in exact mode
    save_every: int = 500  # steps between checkpoints
    keep: int = 2  # checkpoints kept, beside the best one
    log_every: int = 10  # steps between logged steps
    log_to: str = ""  # also to tensorboard, wandb or trackio, with commas between them
    max_holes: float = 0.05  # share of unusable samples past which the run stops
    max_skipped: int = 20  # skipped steps in a row (not finite, or spikes) past which the run stops
    max_unsaved: int = 3  # saves that fail in a row past which the run stops
    spike: float = 0.0  # skip a step whose loss or gradient norm is so many deviations above the median; 0 for never
    hang_seconds: float = 1800.0  # without a sign of life after which the run ends itself; 0 for never

    def __post_init__(self) -> None:
        problems = value_problems(vars(self), {field.name: field.type for field in fields(self)})
        if problems:
            raise ValueError("RunOptions: " + "; ".join(problems))
        if self.precision not in ("fp32", "bf16"):
            problems.append(f"precision must be fp32 or bf16, got {self.precision!r}")
        if self.parallel not in KINDS:
            problems.append(f"parallel must be one of {', '.join(KINDS)}, got {self.parallel!r}")
        if self.exact and self.parallel in ("ddp", "fsdp"):
            problems.append(f"exact adds gradients in float64 itself and cannot go with parallel {self.parallel!r}")
        if self.exact and self.compile:
            problems.append("exact promises equal bits, which compiled code does not give; leave out one of the two")
        for name in ("save_every", "keep", "log_every", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"{name} must be at least 1, got {value}")
        if self.workers is not None and self.workers < 0:
            problems.append(f"workers must not be negative (0 loads in the trainer itself), got {self.workers}")
        for name in ("max_skipped", "max_unsaved", "spike", "hang_seconds"):
            if not getattr(self, name) >= 0:
                problems.append(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.max_holes <= 1:
            problems.append(f"max_holes must lie between 0 and 1, got {self.max_holes}")
        problems += unknown(self.loggers)
        if problems:
            raise ValueError("RunOptions: " + "; ".join(problems))

    @property
    def loggers(self) -> list[str]:
        """The names in `log_to`."""
        return [name.strip() for name in self.log_to.split(",") if name.strip()]

    @property
    def arithmetic_threads(self) -> int | None:
        """Threads of each process's arithmetic, None for torch's own choice."""
        return 1 if self.exact and self.threads is None else self.threads
