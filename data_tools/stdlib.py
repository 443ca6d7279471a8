"""Functions of Python's own library with their docstrings: pairs of text and code that every machine has.

Nothing is downloaded: the running Python's library is read (PSF licence), without its tests and without what was
installed beside it. Counts depend on Python's version; 3.11.7 gives 6,401 pairs from 396 modules, 28 copies left out.
"""

import ast
import hashlib
import json
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mmpre.data_tools.card import EvalTask, write_card
from mmpre.data_tools.folder import whole_folder
from mmpre.data_tools.packages import Got, PackageMissingError
from mmpre.data_tools.split import RULE, split_of
from mmpre.data_tools.writing import Sample, write_splits

description = "functions of Python's library with their docstrings (English): 6,401 pairs of text and code (3.11)"
licence = "PSF-2.0 (Python Software Foundation)"
size = "nothing to download"
packages = ()
tasks = (EvalTask(kind="retrieval", about="a function by its docstring", input="txt", target="py"),)
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
MIN_WORDS, LINES = 3, range(3, 61)


def build(out: Path, *, source: Path | None = None) -> Path:
    """Write functions of 3 to 60 lines whose docstring has 3 words or more: `txt`, and `py` without the docstring.

    A module stands in one split whole. Held-out functions whose docstring or code a training module has too (some
    modules are copies of others) are left out. `source` is the folder of another Python's library.
    """
    folder = source or Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.rglob("*.py") if not LEFT_OUT & set(path.relative_to(folder).parts))
    if not files:
        raise PackageMissingError(f"stdlib: no Python files in {folder}; name the folder of a Python's library")
    pairs, modules, digest = [], Counter(), hashlib.sha256()
    for path in files:
        module = path.relative_to(folder).as_posix()
        content = path.read_bytes()
        digest.update(f"{module}\0{len(content)}\0".encode() + content)
        split, before = split_of(module), len(pairs)
        pairs += [(split, sample) for sample in functions(content, module)]
        modules[split] += len(pairs) > before
    pairs, copies = without_copies(pairs)
    got = Got("Python", "installed", folder, platform.python_version() if source is None else "of unknown version",
              sha256=digest.hexdigest())  # fmt: skip
    with whole_folder(out) as aside:
        counts = write_splits(aside, pairs, "stdlib", total=len(pairs))
        write_card(aside, name="stdlib", licence=licence, sources=[got], counts=counts, tasks=tasks,
                   modules={split: modules[split] for split in counts},
                   split_rule=f"by module ('asyncio/events.py'): {RULE}; {copies} copies left out")  # fmt: skip
    return out


def without_copies(pairs: list[tuple[str, Sample]]) -> tuple[list[tuple[str, Sample]], int]:
    """Without held-out functions whose docstring or code is one of training's, and how many those were."""
    known = {sample[member] for split, sample in pairs if split == "train" for member in ("txt", "py")}
    kept = [one for one in pairs if one[0] == "train" or not known & {one[1]["txt"], one[1]["py"]}]
    return kept, len(pairs) - len(kept)


def functions(content: bytes, module: str) -> Iterator[Sample]:
    """The documented functions of a file, methods and inner functions too, in the order of the file."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):  # templates and deliberately broken files
        return
    lines = content.splitlines(keepends=True)
    found = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    for node in sorted(found, key=lambda node: node.lineno):
        docstring, length = ast.get_docstring(node), node.end_lineno - node.lineno + 1
        if docstring and len(docstring.split()) >= MIN_WORDS and length in LINES:
            about = {"module": module, "name": node.name, "line": node.lineno, "lines": length}
            key = f"lib/{module.removesuffix('.py')}-{node.lineno:05d}".replace(".", "_")  # a key may not begin with __
            yield {"__key__": key, "txt": docstring, "py": without_docstring(lines, node), "json": json.dumps(about)}


def without_docstring(lines: list[bytes], node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """A function's source, begun at the margin, without the text that says what it does."""
    own, said, start = lines[node.lineno - 1 : node.end_lineno], node.body[0], node.lineno
    first, last = said.lineno - start, said.end_lineno - start
    # ast counts columns in bytes
    rest = own[first][: said.col_offset] + own[last][said.end_col_offset :].lstrip(b"; ")
    kept = [*own[:first], *([rest] if rest.strip() else []), *own[last + 1 :]]
    margin = b" " * node.col_offset
    return b"".join(line.removeprefix(margin) for line in kept).decode("utf-8", errors="replace")
