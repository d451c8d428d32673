"""Experts that saw few tokens borrow from the moments of all experts of their block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from fasc_lightning.expert_views import expert_groups
from fasc_lightning.forms import Form, mixed
from fasc_lightning.layer_moments import LayerMoments, layer_moments
from fasc_lightning.moments import CalibrationMoments

#: An expert needs so many tokens for each feature of its layer to stand on its own moments.
TOKENS_PER_FEATURE = 2

#: Fields that are expectations over tokens. Those over sequences (``fisher_rows``, ``kronecker``) grow with the tokens
#: that an expert sees of a sequence, so that experts' do not pool.
_FIELDS = ("mean_x", "mean_h", "C", "abs_x", "saliency")
#: Those that stay what they are.
_OWN = ("fisher_rows", "kronecker")


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
            pool = blend(pool, own, pool.tokens / tokens, tokens)
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


def blend(own: LayerMoments, pool: LayerMoments, weight: float, tokens: int | None = None) -> LayerMoments:
    """Return ``weight`` of one layer's moments and the rest of another's; sums of sequences are those of the first.

    Sketched moments stay low rank plus diagonal as long as that is smaller (:func:`~fasc_lightning.forms.mixed`).

    Args:
        own: The first.
        pool: The second, with the same fields.
        weight: In [0, 1].
        tokens: Behind the expectations; those of the first by default.
    """

    def both(a: tuple[Form, Form], b: tuple[Form, Form]) -> tuple[Form, Form]:
        return mixed(a[0], b[0], weight), mixed(a[1], b[1], weight)

    fields: dict[str, Any] = {name: getattr(own, name) for name in _OWN}
    for name in _FIELDS:
        a, b = getattr(own, name), getattr(pool, name)
        fields[name] = None if a is None else b.lerp(a, weight)
    return layer_moments(
        both(own.plain_forms(), pool.plain_forms()),
        both(own.coupled_forms(), pool.coupled_forms()) if own.is_coupled else None,
        tokens=own.tokens if tokens is None else tokens,
        **fields,
    )
