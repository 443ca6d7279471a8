"""Pages in Markdown: tables, and numbers over seeds."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean and standard deviation; of one value that alone, of none nothing."""
    if not len(values):
        return ""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def student_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of two values or more, and its 95 percent interval by Student's t."""
    middle, count = float(np.mean(values)), len(values)
    reach = float(student.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return middle, middle - reach, middle + reach
