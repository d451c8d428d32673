"""compress(): the whole of a calibration fit in one call."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import nn
from torch.utils.data import DataLoader

from fasc_lightning.callback import FascCallback
from fasc_lightning.module import CausalLMModule
from fasc_lightning.report import CompressionReport


def compress(
    model: nn.Module,
    batches: DataLoader[Any] | Iterable[Any],
    *,
    rank: int | float | None = None,
    keep: float | None = None,
    progress: bool = True,
    **options: Any,
) -> CompressionReport:
    """Compress a model in place, as it is: calibrate frozen on the batches, factorise, swap.

    Runs a one-epoch Trainer fit with a :class:`FascCallback` on the model's device. The model keeps its device, its
    training mode and its ``requires_grad`` flags; if anything fails, it is what it was.

    Args:
        model: A transformers causal language model, or any LightningModule with a ``training_step``.
        batches: A DataLoader, or batches: for a language model mappings with "input_ids" and optionally
            "attention_mask" and "labels".
        rank: See :class:`FascCallback`.
        keep: See :class:`FascCallback`.
        progress: Whether to show progress bars and the memory that the moments will need.
        **options: Any other option of :class:`FascCallback`; ``update_weights`` must stay False.

    Returns:
        What was done.

    Raises:
        ValueError: If an option is out of range, or ``update_weights`` is asked for.
        TypeError: If the model is neither a LightningModule nor a causal language model of transformers.

    Example:
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
    if options.setdefault("update_weights", False):
        raise ValueError(
            "Expected update_weights=False: compress() calibrates a model as it is. To train while calibrating, use "
            "Trainer(callbacks=[FascCallback(...)])."
        )
    callback = FascCallback(rank=rank, keep=keep, **options)
    module, prefix = _as_lightning_module(model)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with _quiet_trainer(progress):
        trainer = pl.Trainer(
            accelerator=device.type if device.type != "cuda" else "gpu",
            devices=[device.index or 0] if device.type == "cuda" else 1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
            callbacks=[callback],
        )
        try:
            trainer.fit(module, _as_loader(batches))
        finally:
            model.to(device)  # Lightning moves modules to the CPU when a fit ends
    assert callback.report is not None
    return _without_prefix(callback.report, prefix)


def _as_lightning_module(model: nn.Module) -> tuple[pl.LightningModule, str]:
    """Return a module to fit, and the prefix that it puts before the model's own names.

    Raises:
        TypeError: If the model is of no kind that has a loss.
    """
    if isinstance(model, pl.LightningModule):
        return model, ""
    from transformers import PreTrainedModel

    causal = isinstance(model, PreTrainedModel) and model.can_generate() and not model.config.is_encoder_decoder
    if causal:
        return CausalLMModule(model), "model."
    raise TypeError(
        f"Expected a LightningModule or a causal language model of transformers but got {type(model).__name__}, whose "
        "loss is not known. Wrap it in a LightningModule with a `training_step` that returns the loss."
    )


def _as_loader(batches: DataLoader[Any] | Iterable[Any]) -> DataLoader[Any]:
    """Return a loader that passes batches on as they are; Trainer takes a plain list for several loaders."""
    if isinstance(batches, DataLoader):
        return batches
    if isinstance(batches, Mapping | torch.Tensor):
        raise TypeError(
            f"Expected a DataLoader or a list of batches but got one {type(batches).__name__}: write [batch]."
        )
    return DataLoader(list(batches), batch_size=None)  # type: ignore[arg-type]


def _without_prefix(report: CompressionReport, prefix: str) -> CompressionReport:
    layers = [replace(layer, name=layer.name.removeprefix(prefix)) for layer in report.layers]
    return replace(report, layers=layers)


@contextmanager
def _quiet_trainer(progress: bool) -> Iterator[None]:
    """Hold back what a Trainer says of devices, workers and modes, which the caller did not ask about."""

    def ours(record: logging.LogRecord) -> bool:
        return progress and record.getMessage().startswith("FascCallback")

    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(ours)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec", category=FutureWarning)
            yield
    finally:
        logger.removeFilter(ours)
