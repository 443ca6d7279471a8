"""The commit that this package is at, for what is written down beside results."""

import subprocess
from functools import cache
from pathlib import Path

QUIET = {"capture_output": True, "text": True, "timeout": 10}


@cache
def commit() -> str | None:
    """The commit of the checkout that this package is run from ("-dirty" where files differ), None where it is none."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], **QUIET)
        told = subprocess.run([*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], **QUIET)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return told.stdout.strip() or None if tracked.returncode == 0 else None


def short(commit: str | None) -> str:
    """A commit's first digits, and whether files differed from it."""
    name, mark, dirty = (commit or "unknown").partition("-")
    return name[:12] + mark + dirty
