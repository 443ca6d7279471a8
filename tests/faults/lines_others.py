"""Lines of the scoreboard for comparison: the same faults on what people use today, in the same run.

These tools promise other things than mmpre: webdataset streams without an index, torch.save and safetensors are file
formats without checksums, torchdata says that its state is for the same number of workers. The figures say what
happens.
"""

import random
import resource
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from lines import Figure, line
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils.data import Dataset

from mmpre.runs import checkpoint

PLACES = 200


class Numbers(Dataset):
    def __len__(self) -> int:
        return 600

    def __getitem__(self, i: int) -> int:
        return i


@line("V2")
def elastic_resume_by_torchdata(folder: Path) -> Figure:
    """StatefulDataLoader: stop within an epoch with 2 workers, go on with 2 and with 3; what of the rest comes."""
    import torchdata
    from torchdata.stateful_dataloader import StatefulDataLoader

    def loader(workers: int) -> StatefulDataLoader:
        return StatefulDataLoader(Numbers(), batch_size=10, num_workers=workers)

    one = loader(2)
    batches = iter(one)
    seen = [i for _ in range(20) for i in next(batches).tolist()]
    state, told = one.state_dict(), {}
    del batches
    for workers in (2, 3):
        other = loader(workers)
        try:
            other.load_state_dict(state)
            rest = [i for batch in other for i in batch.tolist()]
            both = seen + rest
            told[f"2 -> {workers}"] = f"lost {600 - len(set(both))}, doubled {len(both) - len(set(both))}"
        except Exception as e:
            told[f"2 -> {workers}"] = f"refused, {type(e).__name__}"
            told[f"message {workers}"] = str(e)[:300]
    shown = "; ".join(f"{name}: {what}" for name, what in told.items() if not name.startswith("message"))
    return Figure(f"{shown} (torchdata {torchdata.__version__})", True, told)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {f"layer{i}.weight": torch.randn(64, 64, generator=generator) for i in range(8)}


def save_torch(folder: Path, some: dict[str, torch.Tensor]) -> None:
    torch.save(some, folder / "model.pt")


def load_torch(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model.pt", weights_only=True)


def save_safetensors(folder: Path, some: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(some, folder / "model.safetensors")


def load_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def save_dcp(folder: Path, some: dict[str, torch.Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(dict(some), checkpoint_id=str(folder / "dcp"))


def load_dcp(folder: Path) -> dict[str, torch.Tensor]:
    some = {name: torch.zeros_like(value) for name, value in tensors().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(some, checkpoint_id=str(folder / "dcp"))
    return some


def save_mmpre(folder: Path, some: dict[str, torch.Tensor]) -> None:
    checkpoint.save(folder / "mmpre", len(list((folder / "mmpre").glob("step-*"))), {"model": some}, {})


def load_mmpre(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoint.latest(folder / "mmpre")
    if newest is None:
        raise checkpoint.CheckpointError("no checkpoint verifies")
    return newest.tensors["model"]


Save, Load = Callable[[Path, dict[str, torch.Tensor]], None], Callable[[Path], dict[str, torch.Tensor]]
KINDS: dict[str, tuple[Save, Load]] = {
    "mmpre": (save_mmpre, load_mmpre),
    "torch.save": (save_torch, load_torch),
    "DCP": (save_dcp, load_dcp),
    "safetensors": (save_safetensors, load_safetensors),
}


@contextmanager
def files_end_at(count: int):
    """No file may grow past so many bytes: a full disk that needs no disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def memory_of(more: int):
    """So many bytes more than now, for a flipped bit may ask for any number."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _versions() -> str:
    return f"torch {torch.__version__.partition('+')[0]}, safetensors {safetensors.__version__}"


@line("V3")
def flipped_bits_of_others(folder: Path) -> Figure:
    """A bit flipped at random places: how often the load raises, how often it gives other numbers and says nothing."""
    told = {}
    for name, (save, load) in KINDS.items():
        place, dice = folder / name, random.Random(3)
        place.mkdir()
        save(place, tensors())
        files = sorted(path for path in place.rglob("*") if path.is_file())
        raised = wrong = 0
        for _ in range(PLACES):
            path = dice.choices(files, [file.stat().st_size for file in files])[0]
            whole = path.read_bytes()
            broken = bytearray(whole)
            broken[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
            path.write_bytes(broken)
            try:
                with memory_of(2 << 30), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                    got = load(place)
                wrong += not all(torch.equal(got[key], value) for key, value in tensors().items())
            except (Exception, CheckpointException):
                raised += 1
            path.write_bytes(whole)
        told[name] = {"raised": raised, "other numbers without a word": wrong, "places": PLACES}
    shown = "; ".join(f"{name} {one['raised'] / PLACES:.0%} found, {one['other numbers without a word']} silent"
                      for name, one in told.items())  # fmt: skip
    return Figure(f"{shown} ({_versions()})", True, told)


@line("V4")
def full_disks_of_others(folder: Path) -> Figure:
    """Save where files may grow to half of what is needed: does the checkpoint saved before still load as it was?"""
    told = {}
    for name, (save, load) in KINDS.items():
        place = folder / name
        place.mkdir()
        save(place, tensors())
        changed = {key: value + 1 for key, value in tensors().items()}
        error = ""
        with files_end_at(64 << 10), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            try:
                save(place, changed)
            except BaseException as e:
                error = f"{type(e).__name__}: {e}"[:200]
        try:
            got = load(place)
            left = "loads" if all(torch.equal(got[key], value) for key, value in tensors().items()) else "other numbers"
        except (Exception, CheckpointException) as e:
            left = f"gone ({type(e).__name__})"
        told[name] = {"the save said": error or "nothing", "the one before": left}
    shown = "; ".join(f"{name}: {one['the one before']}" for name, one in told.items())
    return Figure(f"{shown} ({_versions()}; each saved twice to one place)", True, told)
