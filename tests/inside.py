"""What tests look at inside a FascCallback while it calibrates."""

from __future__ import annotations

from typing import Any

from fasc_lightning import FascCallback


def gathering_of(callback: FascCallback) -> Any:
    """The statistics of the share whose pass it is."""
    return callback._calibration.run._passes.gathering


def moments_of(callback: FascCallback) -> Any:
    return gathering_of(callback).moments


def kept_by(callback: FascCallback) -> list[Any]:
    """The batches that are kept to be run once more."""
    return callback._calibration.run.statistics().kept.batches


def is_calibrating(callback: FascCallback) -> bool:
    run = callback._calibration.run
    return run is not None and run.running


def layers_of(callback: FascCallback) -> dict[str, Any]:
    """The targeted layers by name."""
    return callback._calibration._layers.modules
