"""The page of faults and the tests that hold them: `python -m tests.faults.catalogue` fills in the page's last column.

A test says which faults it holds: `@pytest.mark.fault("D3", "D4")`.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "docs" / "faults.md"
WITHOUT = "does not apply: "  # begins the last column of a fault that no test can hold, before the reason


@dataclass(frozen=True)
class Row:
    """A line of the page: a fault, what happens, and in the last column its tests or why there is none."""

    fault: str
    what: str
    then: str
    held: str

    @property
    def applies(self) -> bool:
        return not self.held.startswith(WITHOUT)


def rows() -> Iterator[Row]:
    for text in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in text.strip().strip("|").split("|")]
        if re.fullmatch(r"[A-I]\d+", cells[0]):
            yield Row(*cells)


def marked() -> dict[str, list[str]]:
    """The tests of each fault, as `file.py: name of the test`."""
    found: dict[str, list[str]] = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            for one in node.decorator_list:
                if isinstance(one, ast.Call) and ast.unparse(one.func) == "pytest.mark.fault":
                    for fault in one.args:
                        found.setdefault(fault.value, []).append(f"{path.name}: {node.name[5:].replace('_', ' ')}")
    return found


def fill_in() -> None:
    """Write the tests' names into the page."""
    tests, page = marked(), PAGE.read_text(encoding="utf-8")
    for row in rows():
        if row.applies:
            held = "; ".join(tests.get(row.fault, []))
            page = re.sub(
                rf"^\| {row.fault} \|.*$",
                lambda _, row=row, held=held: f"| {row.fault} | {row.what} | {row.then} | {held} |",
                page,
                flags=re.M,
            )
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    fill_in()
