"""HSIC of minibatches of tokens for many layers at once, weighted for the sums of the dependence scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fasc_lightning.batches import MIN_SEQUENCES
from fasc_lightning.dependence._grams import Cut, PairSums
from fasc_lightning.dependence._hsic import hsic_between, hsic_permuted, hsic_unbiased, random_orders

#: Random orders of sequences behind the null, beside the identity: with it, ten times all orders of four sequences and
#: twice all orders of five.
PERMUTATIONS = 239

#: Most numbers in the Gram matrices and samples that are computed together.
TOGETHER = 2**21


@dataclass(frozen=True)
class Estimates:
    """HSIC of one minibatch of each of L layers, weighted by its tokens.

    Attributes:
        finite: Whether x and g are finite, shape (L,).
        sums: What the minibatch adds to the sums of a score, by name; the first dimension is L.
        rows: Pseudo-values (xx, xg, gg) of HSIC, shape (L, rows, 3): one row for each block, or a single one; no rows
            for fewer than four sequences.
    """

    finite: Tensor
    sums: dict[str, Tensor]
    rows: Tensor


def estimate(x: Sequence[Tensor], g: Sequence[Tensor], seed: int) -> Estimates:
    """Return the estimates of a minibatch of each layer.

    Args:
        x: Activations of each layer, each of shape (sequences, tokens, n); layers may share a tensor.
        g: Gradients of each layer, each of shape (sequences, tokens, m).
        seed: Seed of the permutations.
    """
    cut = Cut(*g[0].shape[:2])
    each = 3 * cut.tokens**2 + cut.tokens * (x[0].shape[2] + g[0].shape[2])
    step = max(1, TOGETHER // each)
    parts = [_pair_sums(x[i : i + step], g[i : i + step], cut) for i in range(0, len(g), step)]
    return _estimates(PairSums.joined(parts), cut, seed)


def _pair_sums(x: Sequence[Tensor], g: Sequence[Tensor], cut: Cut) -> PairSums:
    different = {id(values): values for values in x}
    place = {key: i for i, key in enumerate(different)}
    inputs = torch.stack([values.flatten(0, 1) for values in different.values()])
    return PairSums.of(inputs, torch.stack([v.flatten(0, 1) for v in g]), [place[id(v)] for v in x], cut)


def _estimates(found: PairSums, cut: Cut, seed: int) -> Estimates:
    s = cut.tokens
    units = torch.stack([found.unit[0].square(), found.unit.prod(0), found.unit[1].square()])
    weights = s * units  # of the three HSIC, (3, L)
    inner = found.products.sum((2, 3)) / s**2
    biased = inner + found.rest / s**2
    own = {"biased": _square(weights * biased), "floor": found.variance.prod(0)}
    finite = torch.isfinite(found.variance).all(0)
    if cut.sequences < MIN_SEQUENCES:
        return Estimates(finite, {f"few_{k}": v for k, v in own.items()}, weights.new_zeros(len(finite), 0, 3))

    orders = random_orders(cut.groups, PERMUTATIONS, seed)
    permuted = hsic_permuted(found.permuted, orders) / s**2
    # Scaled so that the identity gives the biased HSIC of all tokens, and exact for the identity itself, which must
    # not exceed itself.
    permuted = permuted * torch.where(inner[1] > 0, biased[1] / inner[1], 1.0)[:, None]
    same = (orders == torch.arange(cut.groups)).all(1).to(permuted.device)
    permuted = weights[1][:, None] * torch.where(same, biased[1][:, None], permuted)

    pairs = ((0, 0), (0, 1), (1, 1))
    between = hsic_between(found.products, found.rows, pairs)  # (3, L, 1 + blocks)
    unbiased, without = between[..., 0], between[..., 1:]
    if cut.length == 1:
        unbiased = torch.stack([
            hsic_unbiased(total * s**2, found.own[list(pair)], found.sums[list(pair)])
            for total, pair in zip(biased, pairs, strict=True)
        ])  # fmt: skip
    rows = unbiased[..., None]
    if without.shape[-1]:
        # Jackknife pseudo-values (Tukey 1958), centred at the estimate.
        moved = (cut.blocks - 1) * (without.mean(-1, keepdim=True) - without)
        rows = (unbiased[..., None] + moved) / cut.blocks
    sums = {**own, "unbiased": _square(weights * unbiased), "permuted": permuted}
    return Estimates(finite, sums, (weights[..., None] * rows).permute(1, 2, 0))


def _square(values: Tensor) -> Tensor:
    """Return (xx, xg, gg) of shape (3, L) as symmetric matrices of shape (L, 2, 2)."""
    return values.T[:, [[0, 1], [1, 2]]]
