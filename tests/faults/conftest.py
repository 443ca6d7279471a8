"""Puts the shared helpers of tests/ on the path, also where this folder is run alone."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
