from __future__ import annotations

import pytest

from fasc_lightning.planning import bytes_of


@pytest.mark.parametrize(
    ("amount", "expected"),
    [("80GB", 80e9), ("1.5 gb", 1.5e9), ("24GiB", 24 * 2**30), ("512 MiB", 2**29), ("1000", 1000), (7, 7), (2e9, 2e9)],
)
def test_amounts_are_read_as_people_write_them(amount, expected):
    assert bytes_of(amount, "memory") == expected


def test_no_amount_is_none():
    assert bytes_of(None, "memory") is None


@pytest.mark.parametrize("amount", ["", "lots", "80 bananas", "1.2.3GB", "-3GB", 0, -1, True, float("nan")])
def test_what_is_no_amount_is_refused_by_name(amount):
    with pytest.raises(ValueError, match="Expected `memory` to be a number of bytes"):
        bytes_of(amount, "memory")
