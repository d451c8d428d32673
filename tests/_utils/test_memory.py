from __future__ import annotations

import pytest

from fasc_lightning._utils import FreedMemory, _memory, amount


def test_freed_memory_is_returned_once_enough_has_come_together(monkeypatch):
    returned = []
    monkeypatch.setattr(_memory, "return_freed_memory", lambda: returned.append(1))
    freed, after = FreedMemory(every=100), []
    for size in (60, 30, 10, 99, 1, 500):
        freed.add(size)
        after.append(len(returned))
    assert after == [0, 0, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (12_345, "12.3 kB"),
        (999_000_000, "999 MB"),
        (1_230_000_000, "1.23 GB"),
        (16.6e12, "16.6 TB"),
    ],
)
def test_amounts_have_three_digits_and_a_unit_that_suits(value, expected):
    assert amount(value, "B") == expected
