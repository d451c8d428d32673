"""Pruning baselines for low-rank compression."""

from fasc_lightning.studies.pruning._llm_pruner import kept_ends, prune_llm
from fasc_lightning.studies.pruning._magnitude import prune_magnitude
from fasc_lightning.studies.pruning._types import PruningResult, TaylorResult

__all__ = [
    # methods
    "kept_ends",
    "prune_llm",
    "prune_magnitude",
    # results
    "PruningResult",
    "TaylorResult",
]
