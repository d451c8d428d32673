"""A calibration in several passes over the data, each with a share of the layers, for moments that do not fit at once.

The model does not change meanwhile, so that every pass sees the same activations and gradients, and the factors are
those of one pass but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import lightning.pytorch as pl
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fasc_lightning.layers import split_name


def passes_of(trainer: pl.Trainer, passes: int) -> int:
    """Return how many passes a fit makes: those asked for, but no more than a fast development run has epochs.

    Raises:
        MisconfigurationException: If the fit has fewer epochs.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return min(passes, trainer.max_epochs or 1)
    if trainer.max_epochs is not None and 0 <= trainer.max_epochs < passes:
        raise MisconfigurationException(
            f"Expected at least {passes} epochs, one for each of `passes`, but got max_epochs={trainer.max_epochs}."
        )
    return passes


def check_averaging(trainer: pl.Trainer, passes: int, sketch: str | None) -> None:
    """Refuse averages of weights, which come in place at the end, where weights are read before.

    Args:
        trainer: Of the fit.
        passes: Of its calibration.
        sketch: How moments are held.

    Raises:
        MisconfigurationException: With the remedy.
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
    """Return the indices of layers that one pass has to gather together, in order: experts of one module.

    Experts that saw few tokens borrow from the others (``statistics/_expert_pooling.py``).
    """

    def unit(entry: tuple[int, str]) -> tuple[str, bool]:
        parts = split_name(entry[1])
        return (entry[1], False) if parts is None else (parts[0], True)

    return [[i for i, _ in entries] for _, entries in groupby(enumerate(names), unit)]


def shares(sizes: Sequence[int], passes: int, units: Sequence[Sequence[int]] | None = None) -> list[list[int]]:
    """Split layers into consecutive shares of about equal size, so that those with one input stay together.

    Args:
        sizes: Of the layers' moments, in order.
        passes: How many shares.
        units: Indices of layers that are not to be parted (:func:`share_units`); each on its own by default.

    Returns:
        The indices of each share, as many as asked for and none of them empty: a pass without one would gather the
        last share again, whose layers had then seen more tokens than the others.

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
        # A unit belongs to the share in which its middle lies, as long as there are units for the shares that follow.
        needed = len(units) - done < passes - len(found)
        if current and (needed or (before + size / 2) * passes >= total * (len(found) + 1)):
            found.append(current)
            current = []
        current.extend(unit)
        before += size
    return [*found, current] if current else found
