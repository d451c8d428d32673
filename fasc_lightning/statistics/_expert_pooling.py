"""Experts that saw few tokens borrow from the moments of all experts of their block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn

from fasc_lightning.layers import ExpertLinear, expert_groups, split_name
from fasc_lightning.statistics._collector import CalibrationMoments
from fasc_lightning.statistics._layer_moments import LayerMoments

#: An expert needs so many tokens for each feature of its layer to stand on its own moments.
TOKENS_PER_FEATURE = 2

#: Statistics that are sums over sequences. They grow with the tokens that an expert sees of a sequence, so that
#: experts' do not pool.
_OF_SEQUENCES = frozenset({"fisher_rows", "kronecker"})


@dataclass(frozen=True)
class _Pool:
    """The sums of the same projection of all experts of a block, as those of one layer."""

    moments: CalibrationMoments
    name: str


class BorrowedMoments:
    """The moments of layers, in which experts with few tokens are filled up with those of all experts of their block.

    With N tokens of its own where it needs N_0 (:func:`tokens_needed`), an expert is given N_0 - N more, spread evenly
    over all the tokens that the same projection of all experts of its block saw, itself included: sums s over tokens
    become s_e + (N_0 - N) / M sum_e s_e, with M the number of those tokens. From N_0 on it stands on its own. An expert
    without tokens is not lent any: nothing is known of what the router would send it, and it stays dense.

    Sketches are sums as well, and experts' have one seed: nothing is made dense for this. Statistics of sequences
    (``fisher_rows``, ``kronecker``) stay the expert's own.

    A block's pool is made when the first of its experts is asked for, so ask before any of them is released, and
    module by module: pools of one experts module are held at a time.

    Args:
        moments: Of all layers.
        layers: The layers by name.
    """

    def __init__(self, moments: CalibrationMoments, layers: Mapping[str, nn.Module]) -> None:
        self._moments = moments
        # By what they are: others may have names like those of experts.
        experts = [name for name, layer in layers.items() if isinstance(layer, ExpertLinear)]
        self._groups = {name: (key, names) for key, names in expert_groups(experts).items() for name in names}
        self._pools: dict[tuple[str, str], _Pool | None] = {}
        shapes = moments.shapes
        self.short = {
            name: moments.tokens(name)
            for name in self._groups
            if name in shapes and borrows(name, moments.tokens(name), shapes[name])
        }
        # What one expert's weight lets through says nothing of another's.
        self.alone = {name: tokens for name, tokens in self.short.items() if moments.projects(name)}
        self.short = {name: tokens for name, tokens in self.short.items() if name not in self.alone}

    def layer(self, name: str) -> LayerMoments:
        """Return a layer's moments, its own or filled up; then ``tokens`` is the number that it was filled up to.

        Raises:
            KeyError: If the layer is not tapped.
            ValueError: If no token reached it; or if it is the first of its block to be asked for, and moments of
                others have been released, or are sketched in another way.
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
        """Return moments of one layer that hold nothing yet, of the kind that it has."""
        like = self._moments
        sketches = {name: like.sketches[name]} if name in like.sketches else None
        return CalibrationMoments({name: like.shapes[name]}, like.dtype, like.device, needs, sketches)

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
        """Print it, and warn of those that would have to borrow and cannot."""
        if self.alone:
            rank_zero_warn(
                f"{len(self.alone)} of {len(self._groups)} expert layers saw fewer than {TOKENS_PER_FEATURE} tokens a "
                "feature and stand on these alone: moments that are held as a weight sees them (sketch='projected') "
                "are not lent to other experts. HINT: calibrate on more tokens, or sketch='range'."
            )
        if (said := self.describe()) is not None:
            rank_zero_info(f"FascCallback: {said}")


def tokens_needed(shape: tuple[int, int]) -> int:
    """Return how many tokens a layer of shape (m, n) needs to stand on its own moments."""
    return TOKENS_PER_FEATURE * max(shape)


def borrows(name: str, tokens: int, shape: tuple[int, int]) -> bool:
    """Tell whether a layer of shape (m, n) that saw so many tokens is an expert's that is filled up."""
    return split_name(name) is not None and 0 < tokens < tokens_needed(shape)


def tokens_behind(tokens: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Return how many tokens the moments of each layer come from: of an expert that borrows, those of all experts.

    Args:
        tokens: That each layer saw.
        shapes: (m, n) of each.
    """
    pools = {name: names for names in expert_groups(tokens).values() for name in names}
    return {
        name: sum(tokens[other] for other in pools[name]) if borrows(name, seen, shapes[name]) else seen
        for name, seen in tokens.items()
    }
