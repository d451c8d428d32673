"""The calibration of a fit: its schedule, passes, freezing, resuming and end."""

from fasc_lightning.calibration._calibration import SCORE_EVERY, SCORE_TOKENS, Calibration
from fasc_lightning.calibration._checks import check_batches_given, check_loss
from fasc_lightning.calibration._finalize import replace_calibrated
from fasc_lightning.calibration._fit_end import skips_backward
from fasc_lightning.calibration._frozen_fit import FrozenFit
from fasc_lightning.calibration._passes import check_epochs_left, share_units, shares
from fasc_lightning.calibration._resume import CalibrationCheckpoint
from fasc_lightning.calibration._schedule import CalibrationSchedule
from fasc_lightning.calibration._sketch_policy import expected_rank, projected, sketches_for_budget

__all__ = [
    "SCORE_EVERY",
    "SCORE_TOKENS",
    "Calibration",
    "CalibrationCheckpoint",
    "CalibrationSchedule",
    "FrozenFit",
    "check_batches_given",
    "check_epochs_left",
    "check_loss",
    "expected_rank",
    "projected",
    "replace_calibrated",
    "share_units",
    "shares",
    "sketches_for_budget",
    "skips_backward",
]
