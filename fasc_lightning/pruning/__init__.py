"""Pruning baselines: what low-rank compression is compared with."""

from fasc_lightning.pruning._types import PruningResult, TaylorResult
from fasc_lightning.pruning.llm_pruner import kept_ends, prune_llm
from fasc_lightning.pruning.magnitude import prune_magnitude

__all__ = [
    # methods
    "kept_ends",
    "prune_llm",
    "prune_magnitude",
    # results
    "PruningResult",
    "TaylorResult",
]
