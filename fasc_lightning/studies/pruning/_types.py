"""What a pruning run did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class PruningResult:
    """Outcome of a pruning run, of weight matrices alone: biases are not counted, neither before nor after.

    Attributes:
        method: "magnitude" or "llm-pruner".
        keep: The budget asked for, a fraction of ``parameters_before``.
        parameters_before: Weights that the targeted layers held.
        parameters_after: Weights that they hold now. Unstructured zeros are still held: only this figure tells of
            saved memory.
        zeros: Weights among ``parameters_after`` that are exactly zero.
        passes: Passes over the calibration data; 0 where none are needed.
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
        """Fraction of the weights that is still held."""
        return self.parameters_after / self.parameters_before

    @property
    def nonzero(self) -> float:
        """Fraction of the weights that is still held and not zero."""
        return (self.parameters_after - self.zeros) / self.parameters_before

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and the two fractions as plain values."""
        return {**asdict(self), "kept": self.kept, "nonzero": self.nonzero}


@dataclass(frozen=True)
class TaylorResult(PruningResult):
    """Outcome of :func:`~fasc_lightning.studies.pruning.prune_llm`.

    Attributes:
        blocks: Indices of the blocks that were pruned; the others are as they were.
        head_groups: Heads (with grouped queries: key-value heads, each with its query heads) of every pruned
            block, before and after; (0, 0) where none were among the targeted layers.
        channels: Intermediate channels of every pruned block's MLP, before and after; (0, 0) likewise.
        config_adjusted: Whether the model's configuration describes the pruned model, so that what
            ``save_pretrained`` writes can be loaded. It cannot where some blocks were kept, since a configuration
            has one size for all blocks, nor where a family ties the heads to the hidden size (GPT-2).
    """

    blocks: tuple[int, ...]
    head_groups: tuple[int, int]
    channels: tuple[int, int]
    config_adjusted: bool


def check_keep(keep: float) -> None:
    """Check a budget.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not in (0, 1].
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise TypeError(f"Expected `keep` to be a number but got {keep!r}.")
    if not 0 < keep <= 1:
        raise ValueError(f"Expected `keep` to be a fraction in (0, 1] but got {keep}.")


def count_weights(layers: Iterable[nn.Module]) -> tuple[int, int]:
    """Return how many weights linear layers hold, and how many of them are exactly zero."""
    weights = [layer.weight.detach() for layer in layers]  # type: ignore[operator]
    return sum(w.numel() for w in weights), sum(int((w == 0).sum()) for w in weights)
