"""The lists of tests: `make test-fast` has tests of every room, and rotated tests exist."""

from __future__ import annotations

from pathlib import Path

from rotation import PARTS, ROTATED, left_out, part_of_suite

ROOT = Path(__file__).parents[1]
LISTED = (ROOT / "tests" / "fast.txt").read_text().splitlines()


def test_every_room_is_in_the_short_suite():
    package = ROOT / "fasc_lightning"
    rooms = {str(file.parent.relative_to(package)) for file in package.rglob("*/__init__.py")}
    missing = {room for room in rooms if not any(f"tests/{room}" in line for line in LISTED)}
    assert missing == set()


def test_what_the_short_suite_names_exists():
    assert [line for line in LISTED if not (ROOT / line.split("::")[0]).exists()] == []


def test_what_is_rotated_exists():
    for line in ROTATED:
        path, name = line.split("::")
        assert f"def {name}(" in (ROOT / path).read_text(), line


def test_every_rotated_test_is_in_one_part():
    first = sorted(ROTATED)[0]
    tests = ["tests/test_other.py::test", *(f"{first}[{i}]" for i in range(10)), *sorted(ROTATED)[1:50]]
    kept = [set(tests) - left_out(tests, part) for part in range(PARTS)]
    assert set.union(*kept) == set(tests)
    assert sum(map(len, kept)) == len(tests) + PARTS - 1  # the other test is in all of them
    assert left_out(tests, None) == set()


def test_the_part_is_that_of_the_environment_or_of_the_commit(monkeypatch):
    monkeypatch.setenv("TESTS_PART", "6")
    assert part_of_suite() == 6 % PARTS
    monkeypatch.setenv("TESTS_PART", "all")
    assert part_of_suite() is None
    monkeypatch.delenv("TESTS_PART")
    assert part_of_suite() in range(PARTS)
