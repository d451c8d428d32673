"""Activations and gradients as the estimators of rho take them: tokens, or whole sequences of tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override


def as_sequences(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return x and g as sequences of tokens; tokens of shape (tokens, features) are sequences of one token.

    Args:
        x: Activations, shape (tokens, n) or (sequences, tokens, n).
        g: Gradients at the same tokens, shape (tokens, m) or (sequences, tokens, m).

    Returns:
        x, shape (sequences, tokens, n), and g, shape (sequences, tokens, m).

    Raises:
        ValueError: If the shapes do not match.
    """
    if x.ndim not in (2, 3) or x.ndim != g.ndim or x.shape[:-1] != g.shape[:-1]:
        raise ValueError(
            "Expected x and g of shape (tokens, features) or (sequences, tokens, features) with as many tokens but got "
            f"{tuple(x.shape)} and {tuple(g.shape)}."
        )
    return (x, g) if x.ndim == 3 else (x[:, None], g[:, None])


class DependenceMetric(Metric):
    """A metric of torchmetrics whose value is rho.

    Args:
        **settings: Settings of :class:`torchmetrics.Metric`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"compute_with_cache": False, **settings})

    @override
    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw one value or a series of values, as every metric of torchmetrics does; it needs matplotlib.

        Args:
            val: A value of ``compute`` or ``forward``, or a list of values; None draws the value of ``compute``.
            ax: Axes of matplotlib to draw on; None makes a figure.

        Returns:
            The figure and the axes.
        """
        return self._plot(val, ax)
