"""Metrics to TensorBoard, wandb and trackio, beside metrics.jsonl. A logger that fails is told once and dropped."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Logger(Protocol):
    rewinds: bool  # can take back what it was told of a step and later ones

    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class Loggers:
    """Hands every line of metrics.jsonl to all loggers; none of them can stop the run.

    A resumed run does the steps after its checkpoint again. `first` is where it begins: TensorBoard hides what it was
    told of that step and later ones. `told` are the lines that were handed on before (step, is it held out?): the
    others, which cannot take anything back, are not told these twice.
    """

    def __init__(
        self, names: Iterable[str], out: Path, record: Mapping[str, Any], *, first: int = 0,
        told: Collection[tuple[int, bool]] = (),
    ) -> None:  # fmt: skip
        self.told = told
        self.loggers: dict[str, Logger] = {}
        for name in names:
            self._guard(name, lambda name=name: self._open(name, out, record, first))

    def write(self, line: Mapping[str, Any]) -> None:
        values = flat(line)
        for name, one in list(self.loggers.items()):
            if one.rewinds or (line["step"], "valid" in line) not in self.told:
                self._guard(name, lambda one=one: one.write(values, line["step"]))

    def flush(self) -> None:
        for name, one in list(self.loggers.items()):
            self._guard(name, one.flush)

    def close(self) -> None:
        for name, one in list(self.loggers.items()):
            self._guard(name, one.close)
        self.loggers.clear()

    def _open(self, name: str, out: Path, record: Mapping[str, Any], first: int) -> None:
        self.loggers[name] = KINDS[name](out, record, first)

    def _guard(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as e:
            self.loggers.pop(name, None)
            hint = f"; install it with: pip install 'mmpre[{name}]'" if isinstance(e, ImportError) else ""
            log.warning("nothing more is logged to %s (%s: %s)%s", name, type(e).__name__, e, hint)


def unknown(names: Iterable[str]) -> list[str]:
    """What is wrong with some names of loggers."""
    return [f"log_to: there is no logger {name!r}; there are {', '.join(KINDS)}" for name in names if name not in KINDS]


def flat(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics.jsonl by names such as train/mlm/loss, train/lr, valid/mlm/loss, valid/loss."""
    if "valid" in line:
        values = {f"valid/{task}/{name}": one for task, some in line["valid"].items() for name, one in some.items()}
        return _numbers(values | {"valid/loss": line["valid_loss"]})
    every = ("norm", "lr", "tokens", "rows")
    values = {f"train/{name}": line[name] for name in every if name in line}
    values |= {f"train/{line['task']}/{name}": one for name, one in line.items() if name not in (*every, "step")}
    values |= {f"train/{line['task']}/picked/{name}": share for name, share in line.get("picked", {}).items()}
    return _numbers(values | {"train/tokens_per_second": line.get("time", {}).get("tokens_per_second")})


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


class TensorBoard:
    """Event files in the run's folder `tensorboard`."""

    rewinds = True

    def __init__(self, out: Path, record: Mapping[str, Any], first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=first if first else None)

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of the project "mmpre" with the folder's name; offline with WANDB_MODE=offline, as wandb says itself."""

    rewinds = False

    def __init__(self, out: Path, record: Mapping[str, Any], first: int) -> None:
        import wandb

        self.run = wandb.init(
            project="mmpre", name=out.name, id=identity(out, record), resume="allow", dir=str(out),
            config=config(record),
        )  # fmt: skip

    def write(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of the project "mmpre" with the folder's name, in trackio's own place on this machine."""

    rewinds = False

    def __init__(self, out: Path, record: Mapping[str, Any], first: int) -> None:
        import trackio

        self.run = trackio.init(
            project="mmpre", name=identity(out, record), resume="allow", config=config(record), embed=False
        )

    def write(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.run.finish()


KINDS: dict[str, Callable[[Path, Mapping[str, Any], int], Logger]] = {
    "tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio,
}  # fmt: skip


def identity(out: Path, record: Mapping[str, Any]) -> str:
    """A name that a resumed run has again and another run in a folder of the same name has not."""
    started = "".join(c for c in record["started"] if c.isalnum())
    return f"{out.resolve().name}-{started}"


def config(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"recipe": record["recipe"]["name"], "scale": record["scale"], **record["numbers"], **record["options"]}
