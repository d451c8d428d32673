"""Training after a compression: of the factors or of adapters on them, with a teacher or without."""

from fasc_lightning.recovery._callback import RecoveryCallback, set_aside_optimizers
from fasc_lightning.recovery._checks import check_recoverable
from fasc_lightning.recovery._distillation import Distillable, Teacher, frozen_copy
from fasc_lightning.recovery._second_fit import RecoveryStage, recovery_instead
from fasc_lightning.recovery._validation import split_loader

__all__ = [
    "Distillable",
    "RecoveryCallback",
    "RecoveryStage",
    "Teacher",
    "check_recoverable",
    "frozen_copy",
    "recovery_instead",
    "set_aside_optimizers",
    "split_loader",
]
