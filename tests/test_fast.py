"""The short suite of `make test-fast` has tests of every room."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]
LISTED = (ROOT / "tests" / "fast.txt").read_text().splitlines()


def test_every_room_is_in_the_short_suite():
    package = ROOT / "fasc_lightning"
    rooms = {str(file.parent.relative_to(package)) for file in package.rglob("*/__init__.py")}
    missing = {room for room in rooms if not any(f"tests/{room}" in line for line in LISTED)}
    assert missing == set()


def test_what_the_short_suite_names_exists():
    assert [line for line in LISTED if not (ROOT / line.split("::")[0]).exists()] == []
