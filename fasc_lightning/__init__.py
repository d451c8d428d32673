"""fasc-lightning: knowledge-aware low-rank compression inside PyTorch Lightning."""

from fasc_lightning.callback import FascCallback
from fasc_lightning.compress import compress
from fasc_lightning.dependence import DependenceScore
from fasc_lightning.hub import load_compressed
from fasc_lightning.module import CausalLMModule
from fasc_lightning.report import CompressionReport

__all__ = [
    # compression
    "FascCallback",
    "compress",
    "CausalLMModule",
    "CompressionReport",
    # saved models
    "load_compressed",
    # diagnosis
    "DependenceScore",
]
