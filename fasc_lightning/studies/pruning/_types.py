"""Results of pruning, and checks of its options."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class PruningResult:
    """Outcome of a pruning run on weight matrices; biases are not counted.

    Attributes:
        method: "magnitude" or "llm-pruner".
        keep: The budget, a fraction of ``parameters_before``.
        parameters_before: Weights of the targeted layers before pruning.
        parameters_after: Weights of these layers now, unstructured zeros included. Only this figure shows saved memory.
        zeros: Weights among ``parameters_after`` that are exactly zero.
        passes: Passes over the calibration data; 0 if none is needed.
        tokens: Predicted tokens of one pass.
        seconds: Wall time of the whole run.
    """

    method: str
    keep: float
    parameters_before: int
    parameters_after: int
    zeros: int
    passes: int
    tokens: int
    seconds: float

    @property
    def kept(self) -> float:
        """The fraction of the weights that remains, zeros included."""
        return self.parameters_after / self.parameters_before

    @property
    def nonzero(self) -> float:
        """The fraction of the weights that remains and is not zero."""
        return (self.parameters_after - self.zeros) / self.parameters_before

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the two fractions as plain values."""
        return {**asdict(self), "kept": self.kept, "nonzero": self.nonzero}


@dataclass(frozen=True)
class TaylorResult(PruningResult):
    """Outcome of :func:`~fasc_lightning.studies.pruning.prune_llm`.

    Attributes:
        blocks: Indices of the pruned blocks; the other blocks are unchanged.
        head_groups: Heads (with grouped queries: key-value heads, each with its query heads) of every pruned block,
            before and after; (0, 0) if no attention layer was targeted.
        channels: Intermediate channels of every pruned block's MLP, before and after; (0, 0) if no MLP layer was
            targeted.
        config_adjusted: Whether the model's configuration describes the pruned model, so that a folder from
            ``save_pretrained`` can be loaded. It cannot if some blocks stay whole, because a configuration has one size
            for all blocks, or if a family ties the heads to the hidden size (GPT-2).
    """

    blocks: tuple[int, ...]
    head_groups: tuple[int, int]
    channels: tuple[int, int]
    config_adjusted: bool


def check_keep(keep: float) -> None:
    """Check a budget.

    Raises:
        TypeError: If the budget is not a number.
        ValueError: If the budget is not in (0, 1].
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(f"Expected `keep` to be a number but got {keep!r}.")
    if not 0 < keep <= 1:
        raise ValueError(f"Expected `keep` to be a fraction in (0, 1] but got {keep}.")


def count_weights(layers: Iterable[nn.Module]) -> tuple[int, int]:
    """Return how many weights linear layers hold, and how many of them are exactly zero."""
    weights = [layer.weight.detach() for layer in layers]  # type: ignore[operator]
    return sum(w.numel() for w in weights), sum(int((w == 0).sum()) for w in weights)
