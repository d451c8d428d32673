"""``compress``: a whole calibration fit in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, Unpack, overload

import lightning.pytorch as pl
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import DataLoader

from fasc_lightning._run_fit import NOT_SAVED, as_loader, run_fit
from fasc_lightning.callback import FascCallback
from fasc_lightning.compression import CompressionReport
from fasc_lightning.options import (
    CompressionKeywords,
    CompressionOptions,
    Precision,
    as_recovery,
    check_precision,
    checks_options,
    options_of,
)
from fasc_lightning.planning import CompressionForecast, batch_tokens, fit_forecast
from fasc_lightning.recovery import split_loader


@overload
def compress(
    model: nn.Module,
    batches: DataLoader[Any] | Iterable[Any],
    options: CompressionOptions | None = None,
    *,
    recovery_data: DataLoader[Any] | Iterable[Any] | None = None,
    recovery_held_out: DataLoader[Any] | Iterable[Any] | None = None,
    precision: Precision | None = None,
    progress: bool = True,
    dry_run: Literal[True],
    **keywords: Unpack[CompressionKeywords],
) -> CompressionForecast: ...


@overload
def compress(
    model: nn.Module,
    batches: DataLoader[Any] | Iterable[Any],
    options: CompressionOptions | None = None,
    *,
    recovery_data: DataLoader[Any] | Iterable[Any] | None = None,
    recovery_held_out: DataLoader[Any] | Iterable[Any] | None = None,
    precision: Precision | None = None,
    progress: bool = True,
    dry_run: Literal[False] = False,
    **keywords: Unpack[CompressionKeywords],
) -> CompressionReport: ...


@checks_options
def compress(
    model: nn.Module,
    batches: DataLoader[Any] | Iterable[Any],
    options: CompressionOptions | None = None,
    *,
    recovery_data: DataLoader[Any] | Iterable[Any] | None = None,
    recovery_held_out: DataLoader[Any] | Iterable[Any] | None = None,
    precision: Precision | None = None,
    progress: bool = True,
    dry_run: bool = False,
    **keywords: Unpack[CompressionKeywords],
) -> CompressionReport | CompressionForecast:
    """Compress a model in place without training it: calibrate on the batches, factorise, swap.

    It runs a Trainer fit of one epoch, or one epoch a pass, with a :class:`FascCallback` on the model's device. The
    model keeps its device, its training mode and its ``requires_grad`` flags. If anything fails, the model is
    unchanged. (If a recovery fails, the model is compressed and not recovered.)

    Args:
        model: A transformers causal language model, or any LightningModule with a ``training_step``.
        batches: A DataLoader, or batches: for a language model mappings with "input_ids" and optionally
            "attention_mask" and "labels", as tensors, lists of ints or NumPy arrays. Without a dimension of samples a
            batch is one sequence, as is each row of a tokenised ``datasets.Dataset``.
        options: Options of the compression, for example a :class:`FascCallback`; None for the defaults.
        recovery_data: Training data of the second fit of a ``recovery``, by AdamW; None for ``batches``.
        recovery_held_out: Data that chooses the best state of the recovery; None holds back an eighth of the training
            data, 64 samples at most.
        precision: Precision of the Trainer that calibrates, refits and measures, for example "bf16-mixed" for a float32
            model on a device that multiplies bfloat16 faster. None is the model's own. A recovery has one of its own.
        progress: Whether to show progress bars, the memory of the moments and the report.
        dry_run: Whether to only forecast memory, time and sizes, after a look at the first batch. The model does not
            run, may be on the meta device, and stays unchanged. A generator of batches is used up.
        **keywords: Options of the compression (:class:`~fasc_lightning.options.CompressionOptions`); they override
            ``options``. The weights are always frozen.

    Returns:
        The report of the compression; for a dry run, its forecast.

    Raises:
        MemoryError: If the moments or the factors do not fit; before the first batch.
        ValueError: If an option is out of range, or if ``update_weights`` is asked for.
        TypeError: If the model is neither a LightningModule nor a causal language model of transformers.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> model = LlamaForCausalLM(config)
        >>> batches = [{"input_ids": torch.randint(64, (4, 32))}]
        >>> report = compress(model, batches, keep=0.8, progress=False)
        >>> report.kept <= 0.8
        True
    """
    check_precision(precision)
    given = options_of(options, keywords, compress)
    if given.setdefault("update_weights", False):
        raise ValueError(
            "Expected update_weights=False: compress() calibrates a model as it is. To train while calibrating, use "
            "Trainer(callbacks=[FascCallback(...)])."
        )
    callback = FascCallback(**given)
    recovery = as_recovery(callback.recovery)
    if recovery is None and not (recovery_data is None and recovery_held_out is None):
        raise ValueError("Expected `recovery` together with data for it but got None. HINT: recovery='lora'.")
    if isinstance(batches, Iterator):  # a dry run or a recovery reads them again
        batches = list(batches)
    if dry_run:
        forecast = fit_forecast(model, callback, *batch_tokens(as_loader(batches, model=model)))
        if progress:
            rank_zero_info(f"\n{forecast}")
        return forecast
    if isinstance(recovery_data, Iterator):
        recovery_data = list(recovery_data)
    if recovery is not None and recovery_held_out is None and not _has_validation(model):
        # Refuses data that cannot be split, before any work.
        split_loader(as_loader(batches if recovery_data is None else recovery_data, model=model))
    prefix = run_fit(model, batches, callback, progress, epochs=callback.passes, precision=precision)
    if recovery is not None:
        run_fit(
            model,
            batches if recovery_data is None else recovery_data,
            callback,
            progress,
            held_out=recovery_held_out,
            recovery=recovery,
            seed=callback.seed,
        )
    assert callback.report is not None
    report = callback.report.without_prefix(prefix)
    if progress:
        rank_zero_info(f"\n{report}")
        rank_zero_info(f"{NOT_SAVED}save_compressed(model, folder).")
    return report


def _has_validation(model: nn.Module) -> bool:
    """Return whether a module has its own validation batches."""
    return isinstance(model, pl.LightningModule) and is_overridden("val_dataloader", model)
