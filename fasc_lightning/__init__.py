"""fasc-lightning: knowledge-aware low-rank compression inside PyTorch Lightning."""

from typing import TYPE_CHECKING, Any

from fasc_lightning.callback import FascCallback
from fasc_lightning.compress import compress
from fasc_lightning.compression import CompressionReport, expert_table
from fasc_lightning.dependence import (
    DependenceScore,
    PooledDependenceScore,
    RhoHistory,
    debiased_rho,
    emergence,
    iid_floor,
    rho,
)
from fasc_lightning.lora_start import LoraStart, lora_start
from fasc_lightning.models import (
    apply_plan,
    compression_plan,
    load_compressed,
    match_checkpoint,
    model_card,
    quantize,
    save_compressed,
    to_dense,
)
from fasc_lightning.module import CausalLMModule
from fasc_lightning.options import (
    Calibration,
    CompressionOptions,
    Distillation,
    FactorRecovery,
    Gate,
    LoraRecovery,
    Memory,
    Monitor,
)
from fasc_lightning.planning import CompressionForecast, plan
from fasc_lightning.recover import recover
from fasc_lightning.recovery import RecoveryCallback
from fasc_lightning.score import score

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fasc_lightning.trainer_callback import FascTrainerCallback

__all__ = [
    # compression
    "FascCallback",
    "FascTrainerCallback",
    "compress",
    "plan",
    "CompressionForecast",
    "quantize",
    "CausalLMModule",
    "CompressionReport",
    # options of a compression
    "CompressionOptions",
    "Calibration",
    "Memory",
    "Monitor",
    "Gate",
    # recovery
    "LoraRecovery",
    "FactorRecovery",
    "Distillation",
    "RecoveryCallback",
    "recover",
    "lora_start",
    "LoraStart",
    # saved models
    "save_compressed",
    "load_compressed",
    "model_card",
    "to_dense",
    "compression_plan",
    "apply_plan",
    "match_checkpoint",
    # diagnosis
    "score",
    "rho",
    "debiased_rho",
    "iid_floor",
    "DependenceScore",
    "PooledDependenceScore",
    "RhoHistory",
    "emergence",
    "expert_table",
]


def __getattr__(name: str) -> Any:
    # The Trainer of transformers takes a second to import, and few programs have both Trainers.
    if name == "FascTrainerCallback":
        from fasc_lightning.trainer_callback import FascTrainerCallback

        return FascTrainerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
