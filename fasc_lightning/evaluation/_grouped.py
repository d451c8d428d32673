"""Mean scores in percent, overall and by group, with the scores of guessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

#: Percent and number of items of each group.
ByGroup = dict[str, tuple[float, int]]


class GroupedPercent(Metric):
    """Mean of scores in [0, 1], in percent, overall and by group, and the mean score of guessing.

    Args:
        groups: All groups that may occur, fixed beforehand so that the states of several processes match.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    #: Name of the groups in errors.
    called = "groups"
    score_sums: Tensor
    counts: Tensor
    chance_sum: Tensor

    def __init__(self, groups: Sequence[str]) -> None:
        super().__init__()
        self.groups = tuple(groups)
        # float64: sums of thousands of F1 scores keep their digits.
        self.add_state("score_sums", torch.zeros(len(self.groups), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(self.groups), dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("chance_sum", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, groups: Sequence[str], chance: Tensor) -> None:
        """Add some items.

        Args:
            scores: Score of each item in [0, 1], or bool, of shape (items,).
            groups: Group of each item.
            chance: Score of each item by guessing, of shape (items,).

        Raises:
            ValueError: If the lengths differ or a group is not among ``groups``.
        """
        if not len(scores) == len(groups) == len(chance):
            raise ValueError(
                f"Expected one entry an item, but got {len(scores)} scores, {len(groups)} {self.called} and "
                f"{len(chance)} chances."
            )
        if unknown := set(groups) - set(self.groups):
            raise ValueError(f"Expected {self.called} among {list(self.groups)}, but got {sorted(unknown)}.")
        place = {group: i for i, group in enumerate(self.groups)}
        index = torch.tensor([place[group] for group in groups], device=self.counts.device, dtype=torch.long)
        self.counts.index_add_(0, index, torch.ones_like(index))
        self.score_sums.index_add_(0, index, scores.to(self.score_sums))
        self.chance_sum += chance.to(self.chance_sum).sum()

    def compute(self) -> dict[str, Tensor]:
        """Return percentages and counts.

        Returns:
            ``percent``, ``chance`` and ``count``, and ``percent/<group>`` and ``count/<group>`` of each group; the
            percentage of a group without items is NaN.
        """
        count = self.counts.sum()
        values = {
            "percent": 100.0 * self.score_sums.sum() / count,
            "chance": 100.0 * self.chance_sum / count,
            "count": count,
        }
        for group, total, of in zip(self.groups, self.score_sums, self.counts, strict=True):
            values[f"percent/{group}"] = 100.0 * total / of
            values[f"count/{group}"] = of
        return values

    def by_group(self) -> ByGroup:
        """Return percent and number of items of each group, as plain numbers."""
        values = self.compute()
        return {group: (values[f"percent/{group}"].item(), int(values[f"count/{group}"])) for group in self.groups}


def grouped_percent(scores: Tensor, groups: Sequence[str], chance: Tensor | float) -> GroupedPercent:
    """Return a metric over the items' groups, sorted, which holds the items.

    Args:
        scores: Score of each item in [0, 1], or bool, of shape (items,).
        groups: Group of each item.
        chance: Score by guessing, of each item or of all.
    """
    metric = GroupedPercent(sorted(set(groups)))
    metric.update(scores, groups, torch.as_tensor(chance, dtype=torch.float64).expand(len(scores)))
    return metric


def plain_groups(by_group: Mapping[str, tuple[float, int]]) -> dict[str, dict[str, float]]:
    """Return groups in their JSON form."""
    return {group: {"percent": percent, "count": count} for group, (percent, count) in by_group.items()}
