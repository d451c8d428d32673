"""Pooled moments: experts with few tokens borrow from all experts of their block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from fasc_lightning.layers import ExpertLinear, expert_groups, split_name
from fasc_lightning.statistics._collector import CalibrationMoments
from fasc_lightning.statistics._layer_moments import LayerMoments

#: Tokens for each feature of its layer from which an expert uses its own moments alone.
TOKENS_PER_FEATURE = 2

#: Sums over sequences. They depend on the tokens of a sequence that one expert sees, so they cannot be pooled.
_OF_SEQUENCES = frozenset({"fisher_rows", "kronecker"})


@dataclass(frozen=True)
class _Pool:
    """The sums of one projection of all experts of a block, as the sums of one layer."""

    moments: CalibrationMoments
    name: str


class BorrowedMoments:
    """Moments of layers in which experts with few tokens borrow from all experts of their block.

    An expert with N tokens that needs N_0 (:func:`tokens_needed`) borrows N_0 - N tokens. They are spread evenly over
    all M tokens that the same projection of all experts of the block saw, its own included: sums s over tokens become
    s_e + (N_0 - N) / M sum_e s_e. From N_0 tokens on it borrows nothing. An expert without tokens borrows nothing
    either, since the router's choices for it are unknown; it stays dense.

    Sketches are sums, too, and experts share one seed, so nothing is made dense. Statistics of sequences
    (``fisher_rows``, ``kronecker``) stay the expert's own.

    A block's pool is made when the first of its experts is asked for. So ask before any of them is released, and module
    by module: only the pools of one experts module are held at a time.

    Args:
        moments: Moments of all layers.
        layers: The layers by name.
    """

    def __init__(self, moments: CalibrationMoments, layers: Mapping[str, nn.Module]) -> None:
        self._moments = moments
        # By class: other layers may have names like an expert's.
        experts = [name for name, layer in layers.items() if isinstance(layer, ExpertLinear)]
        self._groups = {name: (key, names) for key, names in expert_groups(experts).items() for name in names}
        self._pools: dict[tuple[str, str], _Pool | None] = {}
        shapes = moments.shapes
        self.short = {
            name: moments.tokens(name)
            for name in self._groups
            if name in shapes and borrows(name, moments.tokens(name), shapes[name])
        }
        # Moments projected through one expert's weight do not fit another's.
        self.alone = {name: tokens for name, tokens in self.short.items() if moments.projects(name)}
        self.short = {name: tokens for name, tokens in self.short.items() if name not in self.alone}

    def layer(self, name: str) -> LayerMoments:
        """Return a layer's moments, its own or filled up; ``tokens`` is then the number that they were filled up to.

        Raises:
            KeyError: If the layer is not tapped.
            ValueError: If no token reached it; or if it is the first of its block to be asked for, and moments of the
                block's other experts have been released, or have other sketches.
        """
        if name not in self._groups:
            return self._moments.layer(name)
        key, names = self._groups[name]
        if key not in self._pools:
            self._pools = {other: pool for other, pool in self._pools.items() if other[0] == key[0]}
            self._pools[key] = self._pool(names) if any(other in self.short for other in names) else None
        pool = self._pools[key]
        if pool is None or name not in self.short:
            return self._moments.layer(name)
        filled = self._empty(name, self._moments.needs).add_layer_(name, self._moments, name)
        missing = tokens_needed(self._moments.shapes[name]) - self.short[name]
        filled.add_layer_(name, pool.moments, pool.name, missing / pool.moments.tokens(pool.name))
        return filled.layer(name)

    def _pool(self, names: list[str]) -> _Pool:
        if released := [name for name in names if name not in self._moments.shapes]:
            raise ValueError(
                f"Expected the moments of all experts of a block but those of {released[0]!r} are released."
            )
        pool = self._empty(names[0], self._moments.needs - _OF_SEQUENCES)
        for name in names:
            pool.add_layer_(names[0], self._moments, name)
        return _Pool(pool, names[0])

    def _empty(self, name: str, needs: frozenset[str]) -> CalibrationMoments:
        """Return empty moments of one layer with the dtype, device and sketches that it has."""
        like = self._moments
        sketches = {name: like.sketches[name]} if name in like.sketches else None
        return CalibrationMoments({name: like.shapes[name]}, like.dtype, like.device, needs, sketches)

    def describe(self) -> str | None:
        """Return a sentence about the borrowing; None if no expert borrows."""
        if not self.short:
            return None
        name = min(self.short, key=lambda other: self.short[other])
        return (
            f"{len(self.short)} of {len(self._groups)} expert layers saw fewer than {TOKENS_PER_FEATURE} tokens a "
            f"feature and borrow from the pooled moments of their block's experts (the fewest: {name!r}, "
            f"{self.short[name]} tokens). HINT: calibrate on more tokens."
        )

    def say(self) -> None:
        """Log the sentence, and warn of experts that would have to borrow and cannot."""
        if self.alone:
            rank_zero_warn(
                f"{len(self.alone)} of {len(self._groups)} expert layers saw fewer than {TOKENS_PER_FEATURE} tokens a "
                "feature and use these alone: moments that are projected through a weight (sketch='projected') cannot "
                "be pooled with other experts. HINT: calibrate on more tokens, or sketch='range'."
            )
        if (said := self.describe()) is not None:
            rank_zero_info(f"FascCallback: {said}")


def tokens_needed(shape: tuple[int, int]) -> int:
    """Return the tokens from which a layer of shape (m, n) uses its own moments alone."""
    return TOKENS_PER_FEATURE * max(shape)


def borrows(name: str, tokens: int, shape: tuple[int, int]) -> bool:
    """Tell whether a layer of shape (m, n) with that many tokens is an expert that borrows."""
    return split_name(name) is not None and 0 < tokens < tokens_needed(shape)


def tokens_behind(tokens: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return the count of tokens behind each layer's moments; for an expert that borrows, the tokens of all experts.

    Args:
        tokens: Tokens of each layer.
        shapes: (m, n) of each layer.
    """
    pools = {name: names for names in expert_groups(tokens).values() for name in names}
    return {
        name: sum(tokens[other] for other in pools[name]) if borrows(name, seen, shapes[name]) else seen
        for name, seen in tokens.items()
    }
