"""The plan of a fit, as FascCallback and compress() carry it out with their options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fasc_lightning.calibration import sketches_for_budget
from fasc_lightning.compression import check_budget_fits, check_rank_fits, statistics_needed
from fasc_lightning.distributed import is_split
from fasc_lightning.layers import TargetedLayers, target_layers
from fasc_lightning.options import CalibrationOptions, CompressionOptions, holds_moments
from fasc_lightning.planning._forecast import CompressionForecast
from fasc_lightning.planning._plan import Tiers, forecast, stored_layers
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

    Gradients and states of an optimizer are not counted, so that a fit is only refused for what the compression itself
    takes.

    Args:
        model: Module that holds them.
        layers: The layers.
        options: Of the compression.
        device: Of the fit.
        keeps_moments: Whether moments stay until the end, for a refit.
        sketches: Of the layers' moments.
        passes: How often the data are gone through.
        batch_tokens: Tokens of one batch; 0 if they are not known.
        tokens: Of all batches; likewise.

    Raises:
        MemoryError: If it does not fit.
    """
    return forecast(
        model,
        layers,
        stored_layers(layers.modules, options.rank, options.keep, options.layout, options.align),
        needs=statistics_needed(options.method, options.gate_threshold, options.gate_by),
        device=device,
        keeps_moments=keeps_moments,
        measured=options.allocation == "measured",
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
    """Plan what :func:`~fasc_lightning.compress` would do to a model.

    Args:
        model: The model, on any device; one without weights is planned for the CPU.
        options: Of the compression.
        batch_tokens: Tokens of one batch; 0 if they are not known.
        tokens: Of all batches; likewise.

    Raises:
        MemoryError: If it does not fit.
        ValueError: If no layer is selected, the budget cannot be met, or the model is on several devices without a
            ``device_map``.
    """
    is_split(model)  # refuses parameters on several devices that nothing brings together, as a fit does
    layers = target_layers(model, options.targets, options.exclude)
    check_rank_fits(layers.shapes, options.rank)
    check_budget_fits(layers.modules, options.rank, options.keep, options.allocation, options.layout, options.align)
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    # "auto" refits where the model allows it, which only a fit finds out.
    refits = bool(options.refit) and holds_moments(options.passes, options.sketch)
    sketching = CalibrationOptions.of(options).sketching
    sketches = sketches_for_budget(layers.shapes, sketching, options.rank, options.keep)
    return layers_forecast(model, layers, options, device, refits, sketches, options.passes, batch_tokens, tokens)


def batch_tokens(batches: DataLoader[Any] | Iterable[Any]) -> tuple[int, int]:
    """Return the tokens of the first batch, and of as many like it as there are; 0 where they cannot be told.

    Args:
        batches: A loader, or batches; of language models mappings with "input_ids".
    """
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed for its workers
        first = next(iter(batches), None)
    ids = first.get("input_ids") if isinstance(first, Mapping) else None
    if not isinstance(ids, Tensor):
        return 0, 0
    try:
        count = len(batches)  # type: ignore[arg-type]
    except TypeError:  # an iterable without an end that is known
        return ids.numel(), 0
    return ids.numel(), count * ids.numel()
