"""The forecast of a fit with the options of FascCallback or compress()."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fasc_lightning.calibration import sketches_for_budget
from fasc_lightning.compression import check_fits, statistics_needed, wanted_refit
from fasc_lightning.distributed import is_split
from fasc_lightning.layers import TargetedLayers, target_layers
from fasc_lightning.options import CalibrationOptions, CompressionOptions, holds_moments
from fasc_lightning.planning._forecast import CompressionForecast
from fasc_lightning.planning._plan import Tiers, forecast
from fasc_lightning.planning._stored_layers import stored_layers
from fasc_lightning.statistics import LayerSketches


def layers_forecast(
    model: nn.Module,
    layers: TargetedLayers,
    options: CompressionOptions,
    device: torch.device,
    keeps_moments: bool,
    sketches: Mapping[str, LayerSketches],
    passes: int = 1,
    batch_tokens: int = 0,
    tokens: int = 0,
) -> CompressionForecast:
    """Plan the compression of some layers.

    Gradients and optimizer states are not counted, so a fit is only refused for the memory of the compression itself.

    Args:
        model: Module that holds the layers.
        layers: The targeted layers.
        options: Options of the compression.
        device: Device of the fit.
        keeps_moments: Whether moments stay until the end, for a refit.
        sketches: Sketches of the layers' moments.
        passes: Number of passes over the data.
        batch_tokens: Tokens of one batch; 0 if unknown.
        tokens: Tokens of all batches; 0 if unknown.

    Raises:
        MemoryError: If the compression does not fit.
    """
    return forecast(
        model,
        layers,
        stored_layers(model, layers.modules, options),
        needs=statistics_needed(options.method, options.gate_threshold, options.gate_by),
        device=device,
        keeps_moments=keeps_moments or options.stages > 1,
        measured=options.measures,
        output_share=options.output_share,
        stages=options.stages,
        tiers=Tiers(
            {options.sketch: sketches},
            (options.moments_device not in (None, device.type),),
            passes,
            {"sketch_size": options.sketch_size, "sketch_above": options.sketch_above},
        ),
        batch_tokens=batch_tokens,
        tokens=tokens,
    )


def fit_forecast(
    model: nn.Module, options: CompressionOptions, batch_tokens: int = 0, tokens: int = 0
) -> CompressionForecast:
    """Plan the compression of a model by :func:`~fasc_lightning.compress`.

    Args:
        model: The model, on any device; a model without weights is planned for the CPU.
        options: Options of the compression.
        batch_tokens: Tokens of one batch; 0 if unknown.
        tokens: Tokens of all batches; 0 if unknown.

    Raises:
        MemoryError: If the compression does not fit.
        ValueError: If no layer is selected, if the budget cannot be met, or if the model is on several devices without
            a ``device_map``.
    """
    is_split(model)  # refuses several devices without a device_map, as a fit does
    layers = target_layers(model, options.targets, options.exclude)
    check_fits(model, layers, options)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    # "auto" counts as a refit of factors: only a fit finds out whether the model allows one.
    wanted = bool(wanted_refit(model, layers.modules, options))
    refits = wanted and holds_moments(options.passes, options.sketch)
    sketching = CalibrationOptions.of(options).sketching
    sketches = sketches_for_budget(layers.shapes, sketching, options.rank, options.keep)
    return layers_forecast(model, layers, options, device, refits, sketches, options.passes, batch_tokens, tokens)


def batch_tokens(batches: DataLoader[Any] | Iterable[Any]) -> tuple[int, int]:
    """Return the tokens of the first batch, and of all batches if they are like the first; 0 if unknown.

    Args:
        batches: A loader, or batches; for language models mappings with "input_ids".
    """
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed for its workers
        first = next(iter(batches), None)
    ids = first.get("input_ids") if isinstance(first, Mapping) else None
    if not isinstance(ids, Tensor):
        return 0, 0
    try:
        count = len(batches)  # type: ignore[arg-type]
    except TypeError:  # an iterable without a length
        return ids.numel(), 0
    return ids.numel(), count * ids.numel()
