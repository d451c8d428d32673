"""Refit of factors to the inputs of the compressed model, in closed form or by training blocks."""

from fasc_lightning.refit._anchored import RefitOptions, layer_state, refit
from fasc_lightning.refit._batch_loss import causal_loss
from fasc_lightning.refit._block_stack import RefitError, find_blocks
from fasc_lightning.refit._block_steps import relative_error
from fasc_lightning.refit._block_training_in_fit import RefinePhase, refine_figures, refine_module
from fasc_lightning.refit._in_fit import ByLayer, RefitPhase, refit_figures
from fasc_lightning.refit._reports import RefitReport

__all__ = [
    "ByLayer",
    "RefinePhase",
    "RefitError",
    "RefitOptions",
    "RefitPhase",
    "RefitReport",
    "causal_loss",
    "find_blocks",
    "layer_state",
    "refine_figures",
    "refine_module",
    "refit",
    "refit_figures",
    "relative_error",
]
