from __future__ import annotations

import pytest
import torch

from fasc_lightning.evaluation._grouped import GroupedPercent, grouped_percent

SCORES = torch.tensor([1.0, 0.0, 0.5, 1.0])
GROUPS = ["b", "a", "a", "b"]
CHANCE = torch.tensor([0.5, 0.25, 0.25, 0.0])


def test_percentages_are_means_by_group():
    metric = grouped_percent(SCORES, GROUPS, CHANCE)
    values = {name: value.item() for name, value in metric.compute().items()}
    assert (values["percent"], values["chance"], values["count"]) == (62.5, 25, 4)
    assert metric.by_group() == {"a": (25, 2), "b": (100, 2)}
    assert list(metric.by_group()) == ["a", "b"]
    assert grouped_percent(SCORES > 0.6, GROUPS, 0.5).compute()["percent"] == 50


def test_parts_merge_into_the_whole():
    whole, first, second = (GroupedPercent(["a", "b", "c"]) for _ in range(3))
    whole.update(SCORES, GROUPS, CHANCE)
    first.update(SCORES[:1], GROUPS[:1], CHANCE[:1])
    second.update(SCORES[1:], GROUPS[1:], CHANCE[1:])
    first.merge_state(second)
    for name, value in whole.compute().items():
        torch.testing.assert_close(first.compute()[name], value, equal_nan=True)
    assert whole.compute()["percent/c"].isnan()
    whole.reset()
    whole.update(SCORES[2:], GROUPS[2:], CHANCE[2:])
    assert whole.compute()["percent"] == 75


def test_wrong_lengths_and_unknown_groups_are_refused():
    with pytest.raises(ValueError, match="4 scores, 3 groups and 4 chances"):
        GroupedPercent(["a", "b"]).update(SCORES, GROUPS[:3], CHANCE)
    with pytest.raises(ValueError, match=r"Expected groups among \['a'\], but got \['b'\]"):
        GroupedPercent(["a"]).update(SCORES, GROUPS, CHANCE)
