"""Recovery: training of the factors, or of adapters on them, after a compression, with or without a teacher."""

from fasc_lightning.recovery._callback import RecoveryCallback
from fasc_lightning.recovery._checks import check_recoverable
from fasc_lightning.recovery._distillation import Distillable
from fasc_lightning.recovery._frozen_copy import frozen_copy
from fasc_lightning.recovery._last_checkpoint import set_aside_optimizers
from fasc_lightning.recovery._stage import RecoveryStage
from fasc_lightning.recovery._teacher import Teacher
from fasc_lightning.recovery._validation import held_out_batches, held_out_loss, split_loader, validates

__all__ = [
    "Distillable",
    "RecoveryCallback",
    "RecoveryStage",
    "Teacher",
    "check_recoverable",
    "frozen_copy",
    "held_out_batches",
    "held_out_loss",
    "set_aside_optimizers",
    "split_loader",
    "validates",
]
