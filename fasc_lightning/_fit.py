"""One pass over batches by a Trainer that nobody asked for: the fits behind ``compress`` and ``score``."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import nn
from torch.utils.data import DataLoader

from fasc_lightning.module import CausalLMModule


def run_fit(model: nn.Module, batches: DataLoader[Any] | Iterable[Any], callback: pl.Callback, progress: bool) -> str:
    """Fit a model for one epoch with a callback, on the model's own device, which it keeps.

    Args:
        model: A LightningModule, or a causal language model of transformers.
        batches: A DataLoader, or batches.
        callback: Does the work.
        progress: Whether to show progress bars and the callback's messages.

    Returns:
        What the fit puts before the model's own names: "" or "model.".

    Raises:
        TypeError: If the model is of no kind that has a loss.
    """
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
    return prefix


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
