"""Which way imports point, and what the command line does not wait for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# who may import what of ours, beside the core and what lies in the same folder
ARROWS = {"mmpre": (), "modalities": (), "recipes": ("modalities",), "data_tools": ()}


def imported(path):
    """The folders of ours that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module else []
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] in ("modalities", "recipes", "data_tools"):
                yield f"{parts[0]} (it is imported as mmpre.{parts[0]})"
            elif parts[0] == "mmpre":
                yield parts[1] if len(parts) > 1 and parts[1] in ARROWS else "mmpre"


@pytest.mark.parametrize("folder", ARROWS)
def test_imports_point_from_recipes_to_modalities_to_the_core(folder):
    legal = {"mmpre", folder, *ARROWS[folder]}
    files = sorted((ROOT / folder).rglob("*.py"))
    wrong = [f"{path.relative_to(ROOT)}: {name}" for path in files for name in imported(path) if name not in legal]
    assert files
    assert not wrong


def test_modalities_do_not_import_each_other():
    for path in (ROOT / "modalities").glob("*.py"):
        assert "modalities" not in set(imported(path)), path


@pytest.mark.parametrize("command", [[], ["--help"], ["--version"], ["nonsense"]])
def test_the_command_line_answers_without_torch(command):
    code = f"""
import sys
from mmpre.command_line.cli import main
try:
    main({command!r})
except SystemExit as e:
    print("exit", e.code)
heavy = sorted({{"torch", "transformers", "timm", "webdataset"}} & set(sys.modules))
print("heavy:", heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "heavy: []" in done.stdout, done.stderr


@pytest.mark.parametrize("optimizer", ["AdamW", "LAMB"])
def test_a_step_of_an_optimizer_does_not_import_torchs_compiler(optimizer):
    code = f"""
import sys, torch
from mmpre.schedules import Constant
from mmpre.training.optim import {optimizer}
weight = torch.nn.Parameter(torch.ones(2, 2))
made = {optimizer}(lr=0.1, schedule=Constant()).build([("weight", weight)])
weight.sum().backward()
made.step()
made.zero_grad()
made.load_state_dict(made.state_dict())
print("compiler:", "torch._dynamo" in sys.modules, weight[0, 0].item() < 1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "compiler: False True" in done.stdout, done.stderr
