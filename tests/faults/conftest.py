"""Puts the shared helpers of tests/ on the path, also where this folder is run alone."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))


@pytest.fixture(scope="session")
def melodies(tmp_path_factory):
    """Shards for `broken.py`; one sample is damaged."""
    from cases import BROKEN

    return BROKEN.make(tmp_path_factory.mktemp("melodies"))


@pytest.fixture(scope="session")
def unbroken(melodies, tmp_path_factory):
    """The run of `broken.py` that nothing befalls, with every checkpoint kept."""
    from runs import train

    return train(tmp_path_factory.mktemp("runs") / "unbroken", melodies, keep=100)
