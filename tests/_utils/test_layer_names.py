from __future__ import annotations

import pytest

from fasc_lightning._utils import some_names


@pytest.mark.parametrize(
    ("names", "shown"),
    [([], ""), (["b", "a"], "a, b"), ({"c", "b", "a"}, "a, b, c"), ("edcba", "a, b, c and 2 more")],
)
def test_names_in_messages(names, shown):
    assert some_names(names) == shown
