"""A module's own training step, run outside of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn

from fasc_lightning._utils import same_rng, seed_rng, undoing
from fasc_lightning.batches._copying import copy_batch
from fasc_lightning.batches._kept import KeptBatches, Place
from fasc_lightning.batches._silence import silent
from fasc_lightning.batches._untouched import untouched
from fasc_lightning.distributed import is_distributed

T = TypeVar("T")


class NoLossError(ValueError):
    """The loss of a module cannot be computed outside of the training loop; the module is unchanged."""


class DifferentiatesError(NoLossError):
    """A training step differentiates although nothing requires a gradient."""


def check_automatic(pl_module: pl.LightningModule, remedy: str) -> None:
    """Check that a training step returns the loss of a given batch, and neither optimises nor fetches batches itself.

    Args:
        pl_module: The module.
        remedy: Last sentence of the error.

    Raises:
        NoLossError: If the module optimises by hand, or its step takes an iterator.
    """
    if not pl_module.automatic_optimization:
        raise NoLossError(f"Expected automatic optimization, so that `training_step` returns a batch's loss. {remedy}")
    if takes_iterator(pl_module):
        raise NoLossError(
            "Expected a training step that is given its batch but it takes batches by itself, from its argument "
            "`dataloader_iter`. HINT: training_step(self, batch, batch_idx)."
        )


def takes_iterator(pl_module: pl.LightningModule) -> bool:
    """Return whether a training step itself takes batches from the loader's iterator."""
    return is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True)


class TrainingStep:
    """A module's own training step, run outside of the training loop without side effects.

    The step runs in the Trainer's precision, with a copy of the batch and the batch's own number. For the same batch it
    draws the same random numbers each time. It logs nothing; module, Trainer and generators are restored.

    Args:
        trainer: Trainer of the fit.
        kept: Kept batches to run.
        device: Device to run them on.

    Attributes:
        batches: The kept batches, on the device.
    """

    def __init__(self, trainer: pl.Trainer, kept: KeptBatches | None = None, device: Any = "cpu") -> None:
        self._trainer = trainer
        # The first process runs the calibration's batches; the others wait for its result.
        self._alone = kept is not None and is_distributed(trainer)
        self.batches: list[Any] = [] if kept is None else kept.on(device)
        places = [] if kept is None else [each.place for each in kept.batches]
        self._places = {id(batch): place for batch, place in zip(self.batches, places, strict=True)}
        self._others: list[Any] = []  # kept alive, so that no id is used again

    def __call__(self, module: nn.Module, batch: Any, place: Place | None = None) -> Tensor:
        """Return the module's loss of a batch, a scalar without a graph.

        Args:
            module: The module, in any mode, which is kept.
            batch: The training step's argument.
            place: Place of the batch; by default its place when it was kept. Other batches are numbered in order of
                their first call.

        Raises:
            NoLossError: If the step returns no loss.
        """
        return self.with_loss(module, batch, Tensor.detach, place)

    def with_loss(self, module: nn.Module, batch: Any, use: Callable[[Tensor], T], place: Place | None = None) -> T:
        """Return a function's value of the loss of a batch, computed while the loss has its graph, if it has one.

        Args:
            module: As for a call.
            batch: As for a call.
            use: The function.
            place: As for a call.

        Raises:
            NoLossError: If the step returns no loss.
        """
        # Gradients are enabled, as in training: physics-informed networks and gradient penalties need them for their
        # loss. No weight requires a gradient, so that other modules make no graph, which would cost memory.
        with untouched(module, *self._schedules()), torch.enable_grad():
            for parameter in module.parameters():
                parameter.requires_grad_(False)
            return use(self.loss(module, batch, place))

    def judge(self, module: nn.Module, batch: Any, place: Place) -> Tensor:
        """Return the loss as a call does, but with gradients disabled as in validation, unless the step needs them."""
        with suppress(DifferentiatesError), untouched(module, *self._schedules()), torch.no_grad():
            return self.loss(module, batch, place)
        return self(module, batch, place)

    def _schedules(self) -> list[Any]:
        """Return the containers of learning rates, which some training steps change themselves."""
        strategy = self._trainer.strategy
        groups = [optimizer.param_groups for optimizer in strategy.optimizers]
        return [*groups, *(vars(config.scheduler) for config in strategy.lr_scheduler_configs)]

    def loss(self, module: nn.Module, batch: Any, place: Place | None = None) -> Tensor:
        """Return the module's loss of a batch with its graph. The caller restores the module (:func:`untouched`)."""
        assert isinstance(module, pl.LightningModule)
        if place is None and id(batch) not in self._places:
            self._places[id(batch)] = replace(Place.of(self._trainer), batch_idx=len(self._others))
            self._others.append(batch)
        place = place or self._places[id(batch)]
        with same_rng(), place.taken(self._trainer), silent(module), self.context(), undoing() as undo:
            if self._alone:
                undo.set(module, "all_gather", _refuse_to_gather)
            seed_rng(place.batch_idx)
            try:
                return training_loss(module, copy_batch(batch), place.batch_idx)
            except RuntimeError as error:
                if _wants_gradients(error):
                    raise DifferentiatesError(
                        "Expected a training step that can run while the weights require no gradient but it "
                        f"differentiates by them ({error})."
                    ) from error
                raise

    def context(self) -> AbstractContextManager[Any]:
        """Return the Trainer's precision as a context, for parts of the module that run by themselves."""
        return self._trainer.precision_plugin.train_step_context()


def training_loss(module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Return the module's own loss of a batch.

    Raises:
        NoLossError: If the training step returns no loss for the batch.
    """
    step = module.training_step
    indexed = is_param_in_hook_signature(step, "batch_idx", min_args=2)  # as the Trainer asks
    outputs: Any = step(batch, batch_idx) if indexed else step(batch)
    loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor):
        raise NoLossError(
            f"Expected a training step that returns a loss for every batch but got {type(loss).__name__}."
        )
    return loss


def _refuse_to_gather(*args: Any, **kwargs: Any) -> None:
    """Stand in for ``all_gather`` if only one process runs a step: it would wait for the others for ever.

    Raises:
        NoLossError: Always.
    """
    del args, kwargs
    raise NoLossError("Expected a training step that one process can run alone but it calls `all_gather`.")


def _wants_gradients(error: RuntimeError) -> bool:
    """Return whether an error comes from differentiation without a graph."""
    return "not require grad" in str(error) or "does not have a grad_fn" in str(error)


def as_trained_on(trainer: pl.Trainer, batch: Any) -> Any:
    """Return a loader's batch, converted and moved as the training loop does before the training step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def brought(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Move modules to the device of a fit inside the context, since Lightning moves them to the CPU when a fit ends.

    Args:
        modules: Modules. A module that is wholly on the CPU is moved and moved back; others stay.
        device: Device of the fit.
    """
    here = [module for module in modules if {p.device.type for p in module.parameters()} == {"cpu"}]
    with undoing() as undo:
        if device.type != "cpu":
            for module in here:
                undo.add(module.cpu)
                module.to(device)
        yield
