"""Budgets: how many parameters, or bytes, a compression may keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import partial

import torch
from torch import nn

from fasc_lightning.compression._allocation import Cost, least_cost
from fasc_lightning.layers import (
    ExpertLinear,
    Grid,
    Layout,
    TargetedLayers,
    auto_cost,
    bytes_in_16_bits,
    factors_cost,
    linear_shape,
    linear_weight,
    pivot_cost,
    rank_budget,
    resolve_rank,
)
from fasc_lightning.options import CompressionOptions, Refit, as_size


def layer_budgets(layers: dict[str, nn.Module], rank: float | None, keep: float | None) -> dict[str, int]:
    """Return how many weights each layer may keep if all are treated alike; the sum is the whole budget.

    ``rank`` spends the degrees of freedom of uniform rank-k matrices, k (m + n - k). ``keep`` is a fraction of the
    layers' parameters; biases count and are kept whole, so the fraction holds with biases counted or not.

    Args:
        layers: The targeted layers.
        rank: Fraction of full rank (float) or absolute rank (int), or None.
        keep: Fraction of parameters, or None.
    """
    budgets = {}
    for name, module in layers.items():
        m, n = linear_shape(module)
        if keep is None:
            assert rank is not None
            budgets[name] = rank_budget(m, n, resolve_rank(m, n, rank))
        else:
            bias = m if getattr(module, "bias", None) is not None else 0
            budgets[name] = math.floor(keep * (m * n + bias)) - bias
    return budgets


def halfway_share(layers: dict[str, nn.Module], rank: float | None, keep: float | None) -> float:
    """Return the share of the layers' parameters that is halfway between all of them and a budget.

    Args:
        layers: The targeted layers.
        rank: As in :func:`layer_budgets`.
        keep: As in :func:`layer_budgets`.
    """
    if keep is None:
        shapes = [linear_shape(module) for module in layers.values()]
        keep = min(1.0, sum(layer_budgets(layers, rank, None).values()) / sum(m * n for m, n in shapes))
    return (1 + keep) / 2


def check_budget_fits(
    layers: dict[str, nn.Module],
    rank: float | None,
    keep: float | None,
    allocation: str,
    layout: Layout,
    align: int = 1,
) -> None:
    """Refuse a budget that does not hold the lowest rank in every layer.

    Raises:
        ValueError: If the budget is too small; the message names the smallest possible one.
    """
    cost, budgets = layout_cost(layout, layers_dtype(layers)), layer_budgets(layers, rank, keep)
    least = {name: least_cost(*linear_shape(module), cost, align) for name, module in layers.items()}
    short = [name for name in layers if budgets[name] < least[name]]
    if (allocation == "uniform" and short) or sum(budgets.values()) < sum(least.values()):
        raise ValueError(
            f"Expected a budget of at least {sum(least.values()):,} parameters (rank {align} in each of {len(layers)} "
            f"layers) but {f'{rank=}' if keep is None else f'{keep=}'} gives {sum(budgets.values()):,}"
            f"{f' and {short[0]!r} too few' if short else ''}. Raise it{'' if align == 1 else ', lower `align`'}, or "
            "exclude small layers."
        )


def layout_cost(layout: Layout, dtype: torch.dtype = torch.float32) -> Cost:
    """Return the number of parameters a layout needs, as a function of (m, n, k)."""
    if layout == "auto":
        return partial(auto_cost, dtype=dtype)
    return factors_cost if layout == "factors" else pivot_cost


def layers_dtype(layers: Mapping[str, nn.Module]) -> torch.dtype:
    """Return the dtype that all layers share; float32 if their dtypes differ."""
    found = {
        module.dtype if isinstance(module, ExpertLinear) else linear_weight(module).dtype for module in layers.values()
    }
    return found.pop() if len(found) == 1 else torch.float32


#: Bytes of a number in floating point, in budgets: as in a model that is saved in 16 bits.
FLOAT_BYTES = 2


#: Share of the bytes in 16 bits below which rounded layers are refitted by default. 4 bits in groups of 64 take 0.27,
#: where a refit gains little for its time (docs/bytes.md).
FEW_BITS = 0.25


def byte_budget(model: nn.Module, layers: Mapping[str, nn.Module], size: float | str) -> int:
    """Return the bytes that the matrices of the targeted layers may take.

    Numbers in floating point count 16 bits, as in a saved model, whatever the model's type. So the choice of bits does
    not depend on it.

    Args:
        model: The model.
        layers: The targeted layers in it.
        size: A fraction of these layers' bytes, or the bytes of the whole model as text ("90MB").
    """
    weights = sum(m * n for m, n in map(linear_shape, layers.values()))
    amount = as_size(size)
    if isinstance(amount, int):
        return amount - (_bytes_in_16_bits(model) - FLOAT_BYTES * weights)
    # As the decimal fraction that was written: the nearest float may be smaller, and lack a byte.
    return math.floor(Fraction(str(amount)) * FLOAT_BYTES * weights)


def _bytes_in_16_bits(model: nn.Module) -> int:
    """Return the bytes of a dense model in 16 bits; shared parameters count once."""
    return bytes_in_16_bits((*model.parameters(), *model.buffers()))


def wanted_refit(model: nn.Module, layers: Mapping[str, nn.Module], options: CompressionOptions) -> Refit:
    """Return the option ``refit``, with "auto" decided for rounded layers: they are refitted below :data:`FEW_BITS`.

    Args:
        model: The model.
        layers: The targeted layers in it.
        options: The options of the compression.
    """
    if options.refit != "auto" or not options.rounds:
        return options.refit
    shapes = [linear_shape(layer) for layer in layers.values()]
    if options.size is not None:
        held = byte_budget(model, layers, options.size)
    else:
        held = sum(options.grids[0].nbytes(m, n) for m, n in shapes)
    few = held < FEW_BITS * FLOAT_BYTES * sum(m * n for m, n in shapes)
    return "auto" if few and options.is_calibrated else False


def check_size_fits(
    model: nn.Module, layers: Mapping[str, nn.Module], size: float | str, grids: Sequence[Grid]
) -> None:
    """Refuse a size that does not hold the smallest grid in every layer.

    Raises:
        ValueError: If the size is too small; the message names the smallest possible one.
    """
    shapes = [linear_shape(layer) for layer in layers.values()]
    least = sum(min(FLOAT_BYTES * m * n, *(grid.nbytes(m, n) for grid in grids)) for m, n in shapes)
    budget, whole = byte_budget(model, layers, size), FLOAT_BYTES * sum(m * n for m, n in shapes)
    if budget >= least:
        return
    if isinstance(size, str):
        rest = _bytes_in_16_bits(model) - whole
        raise ValueError(
            f"Expected a `size` of at least {math.ceil((rest + least) / 1e3):,} KB for this model, of which "
            f"{rest / 1e3:,.0f} KB are not of the targeted layers, but got {size!r}. Raise it, or target more layers."
        )
    raise ValueError(
        f"Expected a `size` of at least {math.ceil(1e4 * least / whole) / 1e4:g} ({least:,} of the targeted layers' "
        f"{whole:,} bytes in 16 bits) but got {size!r}."
    )


def check_fits(model: nn.Module, layers: TargetedLayers, options: CompressionOptions) -> None:
    """Refuse a budget that the targeted layers cannot meet.

    Raises:
        ValueError: If the budget is too small, or a rank too large; the message names what is possible.
    """
    if options.size is not None:
        check_size_fits(model, layers.modules, options.size, options.grids)
    elif not options.rounds:
        check_rank_fits(layers.shapes, options.rank)
        check_budget_fits(layers.modules, options.rank, options.keep, options.allocation, options.layout, options.align)


def check_rank_fits(shapes: Mapping[str, tuple[int, int]], rank: float | None) -> None:
    """Refuse an absolute rank that is larger than min(m, n) of some layer.

    Raises:
        ValueError: If there are such layers; the message counts them and names one.
    """
    if isinstance(rank, int):
        small = [f"{name} {shape}" for name, shape in shapes.items() if min(shape) < rank]
        if small:
            raise ValueError(
                f"Expected `rank` to be at most min(m, n) of every layer but rank={rank} is larger than "
                f"{len(small)} of {len(shapes)} (for example {small[0]}). Lower it, give a fraction, or exclude them."
            )
