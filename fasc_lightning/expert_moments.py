"""Experts that saw few tokens borrow from the moments of all experts of their block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from fasc_lightning.expert_views import expert_groups
from fasc_lightning.moments import CalibrationMoments, LayerMoments

#: An expert needs so many tokens for each feature of its layer to stand on its own moments.
TOKENS_PER_FEATURE = 2

#: Fields that are expectations over tokens. Those over sequences (``fisher_rows``, ``kronecker``) grow with the tokens
#: that an expert sees of a sequence, so that experts' do not pool.
_FIELDS = ("A", "G", "mean_x", "mean_h", "C", "abs_x", "saliency", "coupled")


class BorrowedMoments:
    """The moments of layers, in which experts with few tokens are filled up with those of all experts of their block.

    With N tokens of its own where it needs N_0 (:func:`tokens_needed`), a layer's moment S becomes

        (N S + (N_0 - N) S_pool) / N_0,    S_pool = sum_e N_e S_e / sum_e N_e,

    as if N_0 - N more tokens had come from the pool; from N_0 on it is its own. The pool is that of the same
    projection of all experts of the block, and includes the expert. An expert without tokens is not lent any: nothing
    is known of what the router would send it, and it stays dense.

    A block's pool is made when the first of its experts is asked for, so ask before any of them is released, and
    module by module: pools of one experts module are held at a time.

    Args:
        moments: Of all layers.
        layers: The layers by name.
    """

    def __init__(self, moments: CalibrationMoments, layers: Mapping[str, nn.Module]) -> None:
        self._moments = moments
        self._groups = {name: (key, names) for key, names in expert_groups(layers).items() for name in names}
        self._pools: dict[tuple[str, str], LayerMoments | None] = {}
        shapes = moments.shapes
        self.short = {
            name: moments.tokens(name)
            for name in self._groups
            if name in shapes and 0 < moments.tokens(name) < tokens_needed(shapes[name])
        }

    def layer(self, name: str) -> LayerMoments:
        """Return a layer's moments, its own or filled up; ``tokens`` stays the number of its own.

        Raises:
            KeyError: If the layer is not tapped.
            ValueError: If no token reached it.
        """
        if name not in self._groups:
            return self._moments.layer(name)
        key, names = self._groups[name]
        if key not in self._pools:
            self._pools = {other: pool for other, pool in self._pools.items() if other[0] == key[0]}
            self._pools[key] = self._pool(names) if any(other in self.short for other in names) else None
        own, pool = self._moments.layer(name), self._pools[key]
        if pool is None or name not in self.short:
            return own
        return blend(own, pool, own.tokens / tokens_needed(self._moments.shapes[name]))

    def _pool(self, names: list[str]) -> LayerMoments:
        pool: LayerMoments | None = None
        for name in names:
            if self._moments.tokens(name) == 0:
                continue
            own = self._moments.layer(name)
            if pool is None:
                pool = own
                continue
            tokens = pool.tokens + own.tokens
            pool = replace(blend(pool, own, pool.tokens / tokens), tokens=tokens)
        assert pool is not None  # one of them is short, and has tokens
        return pool

    def describe(self) -> str | None:
        """Return what is borrowed, in a sentence; None if nothing is."""
        if not self.short:
            return None
        name = min(self.short, key=lambda other: self.short[other])
        return (
            f"{len(self.short)} of {len(self._groups)} expert layers saw fewer than {TOKENS_PER_FEATURE} tokens a "
            f"feature and borrow from the pooled moments of their block's experts (the fewest: {name!r}, "
            f"{self.short[name]} tokens). HINT: calibrate on more tokens."
        )

    def say(self) -> None:
        """Print it."""
        if (said := self.describe()) is not None:
            rank_zero_info(f"FascCallback: {said}")


def tokens_needed(shape: tuple[int, int]) -> int:
    """Return how many tokens a layer of shape (m, n) needs to stand on its own moments."""
    return TOKENS_PER_FEATURE * max(shape)


def blend(own: LayerMoments, pool: LayerMoments, weight: float) -> LayerMoments:
    """Return ``weight`` of one layer's moments and the rest of another's; tokens and sums of sequences of the first.

    Args:
        own: The first.
        pool: The second, with the same fields.
        weight: In [0, 1].
    """

    def mixed(a: Tensor, b: Tensor) -> Tensor:
        return b.lerp(a, weight)

    changes: dict[str, Any] = {}
    for field in _FIELDS:
        a, b = getattr(own, field), getattr(pool, field)
        if isinstance(a, tuple):
            changes[field] = tuple(mixed(x, y) for x, y in zip(a, b, strict=True))
        elif a is not None:
            changes[field] = mixed(a, b)
    return replace(own, **changes)
