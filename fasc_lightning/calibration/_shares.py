"""Shares of the layers for a calibration in several passes, if the moments of all layers do not fit at once.

The model does not change between passes. So every pass sees the same activations and gradients, and the factors are the
same as with one pass, except for the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fasc_lightning.layers import split_name


def passes_of(trainer: pl.Trainer, passes: int) -> int:
    """Return the number of passes of a fit: the given number, or fewer if a fast development run has fewer epochs.

    Raises:
        MisconfigurationException: If any other fit has fewer epochs than passes.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return min(passes, trainer.max_epochs or 1)
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs < passes:
        raise MisconfigurationException(
            f"Expected at least {passes} epochs, one for each of `passes`, but got max_epochs={trainer.max_epochs}."
        )
    return passes


def check_averaging(trainer: pl.Trainer, passes: int, sketch: str | None) -> None:
    """Refuse averaging of weights if the calibration reads weights before the average is in place, at the end.

    Args:
        trainer: Trainer of the fit.
        passes: Passes of its calibration.
        sketch: Option ``sketch``.

    Raises:
        MisconfigurationException: If a callback averages weights; the message names the remedy.
    """
    kinds = WeightAveraging, StochasticWeightAveraging
    if not any(isinstance(c, kinds) for c in trainer.callbacks):  # type: ignore[attr-defined]
        return
    reason = "layers of the first ones would be factorised" if passes > 1 else ""
    if sketch == "projected":
        reason = "moments would be those that other weights see"
    if reason:
        what = "with sketch='projected'" if sketch == "projected" else f"in a calibration of {passes} passes"
        raise MisconfigurationException(
            f"Expected no averaging of weights {what}: {reason} before the average is in place. HINT: compress() the "
            "averaged model."
        )


def check_epochs_left(trainer: pl.Trainer, passes: int) -> None:
    """Refuse a fit that is resumed after its first pass and does not go back to it.

    Raises:
        MisconfigurationException: If fewer epochs are left than passes.
    """
    if passes > 1 and trainer.max_epochs is not None and trainer.max_epochs - trainer.current_epoch < passes:
        raise MisconfigurationException(
            f"Expected {passes} epochs, one for each of `passes`, but the fit is resumed in epoch "
            f"{trainer.current_epoch} of {trainer.max_epochs}. HINT: raise max_epochs, or resume from a checkpoint of "
            "before the calibration."
        )


def share_units(names: Iterable[str]) -> list[list[int]]:
    """Return the indices of layers that one pass has to gather together, in order: the experts of one module.

    Experts that saw few tokens borrow statistics from the others (``statistics/_expert_pooling.py``).
    """

    def unit(entry: tuple[int, str]) -> tuple[str, bool]:
        parts = split_name(entry[1])
        return (entry[1], False) if parts is None else (parts[0], True)

    return [[i for i, _ in entries] for _, entries in groupby(enumerate(names), unit)]


def shares(sizes: Sequence[int], passes: int, units: Sequence[Sequence[int]] | None = None) -> list[list[int]]:
    """Split layers into consecutive shares of about equal size; most layers that share an input stay together.

    Args:
        sizes: Bytes of the layers' moments, in order.
        passes: Number of shares.
        units: Indices of layers that have to stay together (:func:`share_units`); None splits any layers.

    Returns:
        The indices of each share. No share is empty: a pass without a share would gather the last share again, and its
        layers would have seen more tokens than the others.

    Raises:
        ValueError: If there are fewer units than shares.
    """
    units = [[i] for i in range(len(sizes))] if units is None else units
    if passes > len(units):
        raise ValueError(
            f"Expected at most {len(units)} passes, one for each layer (experts of a module together), but got "
            f"{passes=}."
        )
    total, before = sum(sizes), 0
    found: list[list[int]] = []
    current: list[int] = []
    for done, unit in enumerate(units):
        size = sum(sizes[i] for i in unit)
        # A unit belongs to the share that holds its middle, as long as enough units are left for the other shares.
        needed = len(units) - done < passes - len(found)
        if current and (needed or (before + size / 2) * passes >= total * (len(found) + 1)):
            found.append(current)
            current = []
        current.extend(unit)
        before += size
    return [*found, current] if current else found
