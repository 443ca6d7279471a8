"""The import names, from an editable install and from a wheel."""

import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_folders_have_their_import_names_and_entry_points_resolve():
    for group in ("mmpre.recipes", "mmpre.modalities", "mmpre.data_sets", "mmpre.benchmarks"):
        points = entry_points(group=group)
        assert points
        for point in points:
            assert point.load().__name__.startswith("mmpre."), point


def test_a_wheel_holds_all_packages_and_works_without_the_tree(tmp_path):
    pytest.importorskip("setuptools")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
               "--disable-pip-version-check", "--wheel-dir", str(tmp_path), str(_copy(tmp_path / "tree"))]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path / "site")
    code = """
import mmpre, mmpre.recipes.bert, mmpre.modalities.text, mmpre.data_tools.split
for module in (mmpre, mmpre.recipes.bert, mmpre.modalities.text, mmpre.data_tools.split):
    assert module.__file__.startswith(sys.argv[1]), module.__file__
from mmpre.report.page import _own
assert all(_own(name) for name in ("page.html", "style.css", "script.js"))
print("ok")
"""
    # first on the path, and without the .pth files of an editable install
    start = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]"
    )
    done = subprocess.run(
        [sys.executable, "-c", start + code, str(tmp_path / "site")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "ok", done.stderr


def _copy(tree):
    """The files that are part of the project, so that building leaves nothing in the tree."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split("\n")
    for name in names:
        if name and (ROOT / name).is_file() and not name.startswith("tests/"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    return tree


def test_every_folder_of_python_files_is_packaged():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {p.parent for top in ("mmpre", "modalities", "recipes", "data_tools") for p in (ROOT / top).rglob("*.py")}
    names = {".".join(f.relative_to(ROOT).parts) for f in folders}
    assert {n if n.startswith("mmpre") else f"mmpre.{n}" for n in names} == listed


def test_every_entry_point_that_is_announced_is_there():
    import tomllib
    from importlib import import_module

    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert groups["mmpre.imports"]
    for points in groups.values():
        for value in points.values():
            import_module(value)
