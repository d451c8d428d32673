"""Benchmarks are scripts that import their neighbours, as if run from their folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
