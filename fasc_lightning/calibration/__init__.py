"""The calibration of a fit: schedule, passes, freezing, resuming and end."""

from fasc_lightning.calibration._frozen_pass import FrozenPass
from fasc_lightning.calibration._gathering import SCORE_EVERY, SCORE_TOKENS
from fasc_lightning.calibration._phase import CalibrationPhase
from fasc_lightning.calibration._shares import share_units, shares
from fasc_lightning.calibration._sketch_policy import expected_rank, projected, sketches_for_budget

__all__ = [
    "SCORE_EVERY",
    "SCORE_TOKENS",
    "CalibrationPhase",
    "FrozenPass",
    "expected_rank",
    "projected",
    "share_units",
    "shares",
    "sketches_for_budget",
]
