"""Minibatches of a sample of tokens, and the sums over their Gram matrices that HSIC is made of."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fasc_lightning.batches import MAX_SEQUENCES
from fasc_lightning.dependence._hsic import block_products, gram_tiles, standardized, tile_products

#: Most tokens of a minibatch: a Gram matrix grows with their square. MAX_SEQUENCES bounds its sequences.
MAX_TOKENS = 2048

#: Fewest groups of sequences that a permutation moves. Groups of neighbours cost less than single sequences.
MIN_GROUPS = 8


@dataclass(frozen=True)
class Cut:
    """The runs of tokens of a minibatch.

    Attributes:
        sequences: Number of sequences.
        length: Tokens of each.
    """

    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.sequences * self.length

    @property
    def blocks(self) -> int:
        """Number of blocks for the debiased value: the sequences, or equal runs of many independent tokens."""
        return self.sequences // -(-self.sequences // MAX_SEQUENCES)

    @property
    def used(self) -> int:
        """Number of tokens in blocks: the last few of many independent tokens stay out."""
        return self.sequences // self.blocks * self.blocks * self.length

    @property
    def groups(self) -> int:
        """Number of groups of blocks that a permutation moves."""
        return next((n for n in range(MIN_GROUPS, self.blocks) if self.blocks % n == 0), self.blocks)


@dataclass(frozen=True)
class _Grams:
    """Gram matrices z z^T of one variable on L samples of the same shape.

    Attributes:
        tiles: Tiles of the tokens in blocks, shape (L, tiles, t, t).
        rest: Products of the tokens outside of blocks with all tokens, shape (L, s - used, s).
        products: <K_ab, K_ab> of all pairs of blocks, shape (L, blocks, blocks).
        rows: Sum of each token's row over each block, shape (L, used, blocks).
        sums: Sum of each token's row, shape (L, s), if sequences have one token; otherwise (L, 0).
        own: Product of each token with itself, shape (L, s).
        unit: unit^2 of the values, shape (L,).
        variance: Variance of the values, shape (L,).
    """

    tiles: Tensor
    rest: Tensor
    products: Tensor
    rows: Tensor
    sums: Tensor
    own: Tensor
    unit: Tensor
    variance: Tensor

    @classmethod
    def of(cls, values: Tensor, cut: Cut) -> _Grams:
        """Return the Gram matrices of values of shape (L, s, n)."""
        z, unit, variance, own = standardized(values)
        used = z[:, : cut.used]
        tiles = gram_tiles(used, cut.groups)
        rows = used @ used.unflatten(1, (cut.blocks, -1)).sum(2).mT
        sums = (z @ z.sum(1, keepdim=True).mT).squeeze(2).double() if cut.length == 1 else own[:, :0]
        rest = z[:, cut.used :] @ z.mT
        products = block_products(tiles, tiles, cut.blocks)
        return cls(tiles, rest, products, rows, sums, own, unit, variance)

    def at(self, places: list[int]) -> _Grams:
        """Return the matrices of some samples, by their places."""
        if places == list(range(len(self.unit))):
            return self
        index = torch.tensor(places, device=self.unit.device)
        return _Grams(*(getattr(self, item.name).index_select(0, index) for item in fields(self)))


@dataclass(frozen=True)
class PairSums:
    """Sums over the Gram matrices K of x and L of g, on L samples of the same shape.

    They are small, so that they can wait until the samples of all layers are there.

    Attributes:
        products: <K_ab, K_ab>, <K_ab, L_ab> and <L_ab, L_ab> of all pairs of blocks, shape (3, L, blocks, blocks).
        rest: The same of all pairs with tokens outside of blocks, shape (3, L).
        rows: Sum of each token's row over each block, in K and in L, shape (2, L, used, blocks).
        sums: Sum of each token's row, shape (2, L, s), if sequences have one token; otherwise (2, L, 0).
        own: Product of each token with itself, shape (2, L, s).
        permuted: Result of :func:`~fasc_lightning.dependence._hsic.tile_products`, shape (L, tiles, groups^2).
        unit: unit^2 of x and g, shape (2, L).
        variance: Variance of x and g, shape (2, L).
    """

    products: Tensor
    rest: Tensor
    rows: Tensor
    sums: Tensor
    own: Tensor
    permuted: Tensor
    unit: Tensor
    variance: Tensor

    @classmethod
    def of(cls, x: Tensor, g: Tensor, places: list[int], cut: Cut) -> PairSums:
        """Return the sums of samples.

        Args:
            x: Inputs, shape (inputs, s, n): layers may share them.
            g: Gradients, shape (L, s, m).
            places: The place in ``x`` of each gradient's input.
            cut: The runs of tokens of each sample.
        """
        with torch.autocast(g.device.type, enabled=False):
            K, L = _Grams.of(x, cut).at(places), _Grams.of(g, cut)
            tiles, rest = K.tiles.to(L.tiles), K.rest.to(L.rest)
            crossed = block_products(tiles, L.tiles, cut.blocks)
            return cls(
                products=torch.stack([K.products, crossed, L.products]),
                rest=torch.stack(
                    [_rest(a, b, cut.used) for a, b in ((K.rest, K.rest), (rest, L.rest), (L.rest, L.rest))]
                ),
                rows=torch.stack([K.rows.to(L.rows), L.rows]),
                sums=torch.stack([K.sums, L.sums]),
                own=torch.stack([K.own, L.own]),
                permuted=tile_products(tiles, L.tiles),
                unit=torch.stack([K.unit, L.unit]),
                variance=torch.stack([K.variance, L.variance]),
            )

    @classmethod
    def joined(cls, parts: list[PairSums]) -> PairSums:
        """Return the sums of samples of the same shape together."""
        if len(parts) == 1:
            return parts[0]
        axis = {"permuted": 0}
        return cls(**{
            item.name: torch.cat([getattr(part, item.name) for part in parts], axis.get(item.name, 1))
            for item in fields(cls)
        })  # fmt: skip


def _rest(K: Tensor, L: Tensor, used: int) -> Tensor:
    """Return the products of K and L over pairs with tokens outside of blocks, shape (L,), float64."""
    both = (K * L).double()
    return 2 * both[:, :, :used].sum((1, 2)) + both[:, :, used:].sum((1, 2))


def minibatches(values: Tensor) -> list[list[Tensor]]:
    """Cut values into sets of sequences, and each set into minibatches of at most :data:`MAX_TOKENS` tokens.

    Args:
        values: Shape (tokens, n) or (sequences, tokens, n).

    Returns:
        For each set of whole sequences its minibatches, shape (sequences, tokens, n). If a set has too many tokens, a
        minibatch takes every k-th token of each sequence, up to a multiple of k. It begins at a different token in each
        sequence, so that no minibatch has the first tokens of all. Tokens of shape (tokens, n) are sequences of one.
    """
    if values.ndim == 2:
        values = values[:, None]
    sequences, length, _ = values.shape
    most = MAX_SEQUENCES if length > 1 else MAX_TOKENS
    sets = values.tensor_split(max(1, -(-sequences // most)))
    cuts = max(1, -(-length * len(sets[0]) // MAX_TOKENS))
    if cuts == 1:
        return [[part] for part in sets]
    found = []
    for part in sets:
        turns = part[:, : length // cuts * cuts].unflatten(1, (-1, cuts))  # (sequences, tokens, cuts, n)
        place = torch.arange(len(part), device=part.device)
        found.append([turns[place, :, (place + first) % cuts] for first in range(cuts)])
    return found
