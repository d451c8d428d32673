"""Tests that take more than a second: the suite runs a quarter of them, another one after each commit."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent
#: Tests by path and name, of which some variant took more than a second.
ROTATED = frozenset((TESTS / "rotated.txt").read_text().split())
PARTS = 4


def part_of_suite() -> int | None:
    """Return the part to run, from 0, or None for all: TESTS_PART of the environment, else the number of commits."""
    asked = os.environ.get("TESTS_PART")
    if asked is None:
        counted = subprocess.run(["git", "rev-list", "--count", "HEAD"], cwd=TESTS, capture_output=True, text=True)
        asked = counted.stdout.strip() or "0"  # no repository
    return None if asked == "all" else int(asked) % PARTS


def left_out(tests: Sequence[str], part: int | None) -> set[str]:
    """Return the tests of other parts. Variants of one test are spread over all parts.

    Args:
        tests: Ids of tests, each with its variant.
        part: The part to run; None leaves nothing out.
    """
    if part is None:
        return set()
    rotated = sorted(test for test in tests if test.partition("[")[0] in ROTATED)
    return {test for number, test in enumerate(rotated) if number % PARTS != part}
