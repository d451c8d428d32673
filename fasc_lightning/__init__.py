"""fasc-lightning: knowledge-aware low-rank compression inside PyTorch Lightning."""

from fasc_lightning.callback import FascCallback
from fasc_lightning.checkpoints import match_checkpoint
from fasc_lightning.compress import compress
from fasc_lightning.dense import to_dense
from fasc_lightning.dependence import DependenceScore
from fasc_lightning.distillation_options import Distillation
from fasc_lightning.expert_report import expert_table
from fasc_lightning.forecast import CompressionForecast
from fasc_lightning.history import RhoHistory, emergence
from fasc_lightning.hub import load_compressed
from fasc_lightning.model_card import model_card
from fasc_lightning.module import CausalLMModule
from fasc_lightning.plan import apply_plan, compression_plan
from fasc_lightning.planning import plan
from fasc_lightning.pooled import PooledDependenceScore, debiased_rho, iid_floor, rho
from fasc_lightning.quantize import quantize
from fasc_lightning.recover import recover
from fasc_lightning.recovery import FactorRecovery, LoraRecovery
from fasc_lightning.recovery_phase import RecoveryCallback
from fasc_lightning.report import CompressionReport
from fasc_lightning.saving import save_compressed
from fasc_lightning.score import score

__all__ = [
    # compression
    "FascCallback",
    "compress",
    "plan",
    "CompressionForecast",
    "quantize",
    "CausalLMModule",
    "CompressionReport",
    # recovery
    "LoraRecovery",
    "FactorRecovery",
    "Distillation",
    "RecoveryCallback",
    "recover",
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
