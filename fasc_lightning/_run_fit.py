"""Fits of ``compress``, ``recover`` and ``score`` over batches, by a Trainer of their own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_module
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from torch import nn
from torch.utils.data import DataLoader

from fasc_lightning._utils import RichWorkBar, undoing
from fasc_lightning.batches import is_hf_dataset, token_batches
from fasc_lightning.distributed import DeviceMapStrategy, check_namespace, check_weights, is_split
from fasc_lightning.module import CausalLMModule
from fasc_lightning.options import Precision, Recovery

#: Start of the messages of a callback.
PREFIX = "FascCallback: "
#: Start of the last line of a compression.
NOT_SAVED = "Not saved yet: "


def run_fit(
    model: nn.Module,
    batches: DataLoader[Any] | Iterable[Any],
    callback: pl.Callback,
    progress: bool,
    *,
    bar: pl.callbacks.ProgressBar | None = None,
    held_out: DataLoader[Any] | Iterable[Any] | None = None,
    recovery: Recovery | None = None,
    seed: int = 0,
    epochs: int = 1,
    precision: Precision | None = None,
) -> str:
    """Fit a model on its own device with a callback, for some epochs or for the length of a recovery.

    Args:
        model: A LightningModule, or a causal language model of transformers.
        batches: A DataLoader, or batches.
        callback: The callback that does the work.
        progress: Whether to show progress bars and the callback's messages.
        bar: The progress bar; None for one of rich, named "Calibration" or "Recovery".
        held_out: Data for validation.
        recovery: Length and learning rate of a language model's training, if it is trained; a list of batches is then
            shuffled.
        seed: Seed of the shuffled order.
        epochs: Epochs of a fit without a recovery.
        precision: Precision of a fit without a recovery.

    Returns:
        The prefix of the model's names in the fit: "" or "model.".

    Raises:
        TypeError: If the model's loss is not known.
        ValueError: If its parameters are on several devices without a ``device_map``, or on none.
    """
    module, prefix = as_lightning_module(model, recovery)
    training: dict[str, Any] = {"max_epochs": epochs, "precision": precision}
    if recovery is not None:
        training = {
            "max_epochs": recovery.epochs,
            "precision": recovery.precision,
            "gradient_clip_val": 1.0 if module.automatic_optimization else None,
        }
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    split = is_split(model)
    check_weights(model.named_parameters())
    bars = [bar or RichWorkBar("Calibration" if recovery is None else "Recovery")] if progress else []
    where: dict[str, Any] = {"strategy": DeviceMapStrategy(device)} if split else {}
    with _quiet_trainer(progress), undoing() as undo:
        undo.keep_modes(model)  # a fit that fails does not tear its module down
        if not split:
            undo.add(model.to, device)  # Lightning moves modules to the CPU when a fit ends
        trainer = pl.Trainer(
            **on_device(device),
            **where,
            **training,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=progress,
            callbacks=[callback, *bars],
        )
        generator = None if recovery is None else torch.Generator().manual_seed(seed)
        held = None if held_out is None else as_loader(held_out, model=module)
        trainer.fit(module, as_loader(batches, generator, module), held)
    return prefix


@contextmanager
def attached(module: pl.LightningModule, device: torch.device) -> Iterator[pl.Trainer]:
    """Attach a Trainer to a module without a fit, so that its step and hooks can use it.

    Args:
        module: The module, whose own Trainer is restored afterwards.
        device: The module's device.
    """
    before = module._trainer
    with _quiet_trainer(False):
        trainer = pl.Trainer(
            **on_device(device),
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
    trainer.state.fn = TrainerFn.FITTING
    trainer.training = True
    try:
        trainer._data_connector.attach_data(module)
        trainer.strategy._lightning_module = module
        yield trainer
    finally:
        module.trainer = before


def on_device(device: torch.device) -> dict[str, Any]:
    """Return the options of a Trainer on one device."""
    cuda = device.type == "cuda"
    return {"accelerator": "gpu" if cuda else device.type, "devices": [device.index or 0] if cuda else 1}


def as_lightning_prefix(model: nn.Module) -> str:
    """Return the prefix of the model's names in a fit."""
    return "" if isinstance(model, pl.LightningModule) else "model."


def as_lightning_module(model: nn.Module, recovery: Recovery | None) -> tuple[pl.LightningModule, str]:
    """Return a module to fit, and the prefix of the model's names in it.

    Raises:
        TypeError: If the model's loss is not known.
    """
    check_namespace(model)
    if isinstance(model, pl.LightningModule):
        return model, ""
    from transformers import PreTrainedModel

    causal = isinstance(model, PreTrainedModel) and model.can_generate() and not model.config.is_encoder_decoder
    if causal and recovery is not None:
        return CausalLMModule(model, recovery.rate, schedule="cosine"), "model."
    if causal:
        return CausalLMModule(model), "model."
    raise TypeError(
        f"Expected a LightningModule or a causal language model of transformers but got {type(model).__name__}, whose "
        "loss is not known. Wrap it in a LightningModule with a `training_step` that returns the loss."
    )


def as_loader(
    batches: DataLoader[Any] | Iterable[Any],
    generator: torch.Generator | None = None,
    model: nn.Module | None = None,
) -> DataLoader[Any]:
    """Return a loader of batches, because a Trainer takes a plain list for several loaders.

    Args:
        batches: A loader or batches. Batches for a language model may have any form that
            :func:`~fasc_lightning.batches.token_batches` accepts; others are passed on unchanged.
        generator: Random generator that shuffles batches; None keeps their order.
        model: The model that takes the batches.

    Raises:
        TypeError: If they are a single batch, or have an unknown form.
        ValueError: If token ids have a shape that a language model does not accept.
    """
    if isinstance(batches, DataLoader):
        return batches
    if isinstance(batches, Mapping) and is_hf_dataset(batches):
        raise TypeError(
            f"Expected batches but got a {type(batches).__name__} of {', '.join(map(repr, batches))}. HINT: give one "
            "of its splits."
        )
    if isinstance(batches, Mapping | torch.Tensor | str):
        raise TypeError(
            f"Expected a DataLoader or a list of batches but got one {type(batches).__name__}: write [batch]."
        )
    language = _language_model(model)
    data: Any = list(batches) if language is None else token_batches(batches, language)
    shuffled: Any = {} if generator is None else {"shuffle": True, "generator": generator}
    return DataLoader(data, batch_size=None, **shuffled)


def _language_model(model: nn.Module | None) -> nn.Module | None:
    """Return the transformers model that takes the batches directly; None if another module takes them."""
    if isinstance(model, CausalLMModule):
        return model.model
    return None if model is None or isinstance(model, pl.LightningModule) else model


@contextmanager
def _quiet_trainer(progress: bool) -> Iterator[None]:
    """Suppress a Trainer's messages on devices, workers and modes, which the caller did not choose."""

    def ours(record: logging.LogRecord) -> bool:
        """Pass the callback's messages on, without the name of a callback that the caller has not used."""
        text = record.getMessage()
        if not (progress and text.startswith(PREFIX)):
            return False
        text = text.removeprefix(PREFIX)
        record.msg, record.args = f"{text[:1].upper()}{text[1:]}", None
        return True

    logger = rank_zero_module.log  # another one after an import of `pytorch_lightning`
    with undoing() as undo:
        undo.add(logger.removeFilter, ours)
        logger.addFilter(ours)
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", PossibleUserWarning)
        # A recovery measures their loss anyway.
        warnings.filterwarnings("ignore", message="You passed in a `val_dataloader` but have no `validation_step`")
        warnings.filterwarnings("ignore", message=r".*treespec, LeafSpec", category=FutureWarning)
        yield
