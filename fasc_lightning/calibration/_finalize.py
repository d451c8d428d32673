"""From a calibration to a compressed module: factorise, swap, refit, refine, and say what was done."""

from __future__ import annotations

import lightning.pytorch as pl
from torch import nn

from fasc_lightning._utils import Clock, peak_memory_bytes, return_freed_memory
from fasc_lightning.calibration._calibration import Calibration
from fasc_lightning.compression import CompressionReport
from fasc_lightning.layers import layer_sizes, model_size, swap_modules
from fasc_lightning.models import attach_config
from fasc_lightning.options import CompressionOptions, reported
from fasc_lightning.refit import refine_figures, refit_figures


def replace_calibrated(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    calibration: Calibration,
    how: CompressionOptions,
    replaced: dict[str, nn.Module],
) -> CompressionReport:
    """Swap a calibrated module's layers for low-rank ones, in place.

    Args:
        trainer: Of the fit.
        pl_module: The module, dense.
        calibration: Of all processes, finished.
        how: The options that say what to make of it.
        replaced: Is given the dense layers by name as soon as they are out of the module: if anything fails after
            that, the caller can put them back.

    Returns:
        What was done.
    """
    timed = Clock()
    before = layer_sizes(calibration.layers), model_size(pl_module)
    return_freed_memory()
    with timed("factorize"):
        if calibration.needs_whole:
            calibration.unsharding.run(pl_module)
        result, layers = calibration.factorize(
            trainer, pl_module, rank=how.rank, keep=how.keep, layout=how.layout, align=how.align
        )
    with timed("swap"):
        replaced.update(swap_modules(pl_module, result.replacements))
        attach_config(pl_module, method=how.method, options=reported(how), seed=how.seed)
        calibration.unsharding.run(pl_module)
    refitted = refined = None
    if calibration.refit is not None:
        with timed("refit"):
            refitted = calibration.run_refit(trainer, pl_module, replaced)
    if calibration.refine is not None:
        with timed("refine"):
            refined = calibration.run_refine(trainer, pl_module, replaced)
    after = layer_sizes({**calibration.layers, **result.replacements}), model_size(pl_module)
    return CompressionReport(
        method=how.method,
        options=reported(how),
        seed=how.seed,
        targeted={"dense": before[0], "compressed": after[0]},
        whole={"dense": before[1], "compressed": after[1]},
        seconds={
            "calibrate": calibration.seconds,
            **timed.seconds,
            "factorize": timed.seconds["factorize"] + calibration.factorizing,
        },
        moments_bytes=calibration.moments_bytes,
        peak_memory_bytes=peak_memory_bytes(trainer.strategy.root_device),
        layers=layers,
        refit=None if refitted is None else refit_figures(refitted),
        refine=None if refined is None else refine_figures(refined),
    )
