"""A module's own training step, run outside of the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from typing import Any

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


class NoLossError(ValueError):
    """A module whose loss of a batch cannot be had outside of the training loop; nothing of it was changed."""


class DifferentiatesError(NoLossError):
    """A training step that differentiates where nothing requires a gradient."""


def check_automatic(pl_module: pl.LightningModule, remedy: str) -> None:
    """Refuse modules whose training step returns no loss of a given batch: it optimises, or fetches batches, by itself.

    Raises:
        NoLossError: With the remedy.
    """
    if not pl_module.automatic_optimization:
        raise NoLossError(f"Expected automatic optimization, so that `training_step` returns a batch's loss. {remedy}")
    if takes_iterator(pl_module):
        raise NoLossError(
            "Expected a training step that is given its batch but it has an argument `dataloader_iter`, from which it "
            "takes batches by itself. HINT: training_step(self, batch, batch_idx)."
        )


def takes_iterator(pl_module: pl.LightningModule) -> bool:
    """Tell whether a training step takes its batches from the loader's iterator by itself."""
    return is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True)


class TrainingStep:
    """A module's own training step outside of the training loop: as in it, but that nothing remains of it.

    The step runs in the Trainer's precision, is given a copy of the batch and the batch's own number, and draws the
    same random numbers each time that it is given the same batch. It logs nothing, and module, Trainer and generators
    are put back.

    Args:
        trainer: Of the fit.
        replay: Batches that will be run.
        device: Where to run them.

    Attributes:
        batches: Those of the replay, on the device.
    """

    def __init__(self, trainer: pl.Trainer, replay: KeptBatches | None = None, device: Any = "cpu") -> None:
        self._trainer = trainer
        # The calibration's batches are run by the first process; the others wait for its result.
        self._alone = replay is not None and is_distributed(trainer)
        self.batches: list[Any] = [] if replay is None else replay.on(device)
        kept = [] if replay is None else replay.batches
        self._places = {id(batch): each.place for batch, each in zip(self.batches, kept, strict=True)}
        self._others: list[Any] = []  # held, so that no id is used again

    def __call__(self, module: nn.Module, batch: Any, place: Place | None = None) -> Tensor:
        """Return the module's loss of a batch, a scalar without a graph.

        Args:
            module: In any mode, which is kept.
            batch: As the training loop would give it to the step.
            place: Where it is; by default where it was kept. A batch that was not is numbered as it comes.

        Raises:
            NoLossError: If the step gives none.
        """
        # As in training, gradients are enabled, by which physics-informed networks and gradient penalties make their
        # loss. Where no weight requires one, nobody else has a graph, which would cost memory.
        with untouched(module, *self._schedules()), torch.enable_grad():
            for parameter in module.parameters():
                parameter.requires_grad_(False)
            return self.loss(module, batch, place).detach()

    def judge(self, module: nn.Module, batch: Any, place: Place) -> Tensor:
        """Return what a call does, with gradients disabled as in a validation, unless the step needs them."""
        with suppress(DifferentiatesError), untouched(module, *self._schedules()), torch.no_grad():
            return self.loss(module, batch, place)
        return self(module, batch, place)

    def _schedules(self) -> list[Any]:
        """Return what a step may change of learning rates, as some do in place of the Trainer."""
        strategy = self._trainer.strategy
        groups = [optimizer.param_groups for optimizer in strategy.optimizers]
        return [*groups, *(vars(config.scheduler) for config in strategy.lr_scheduler_configs)]

    def loss(self, module: nn.Module, batch: Any, place: Place | None = None) -> Tensor:
        """Return the module's loss of a batch, with its graph; for those who see to :func:`untouched` themselves."""
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
        """Return the Trainer's precision as a context, for parts of the module that are run by themselves."""
        return self._trainer.precision_plugin.train_step_context()


def training_loss(module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Return the module's own loss of a batch.

    Raises:
        NoLossError: If the training step skips it.
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
    """Stand in for ``all_gather`` where only one process runs a step, which would wait for the others for ever.

    Raises:
        NoLossError: Always.
    """
    del args, kwargs
    raise NoLossError("Expected a training step that one process can run alone but it calls `all_gather`.")


def _wants_gradients(error: RuntimeError) -> bool:
    """Tell whether an error is that of a step which differentiates where nothing has a graph."""
    return "not require grad" in str(error) or "does not have a grad_fn" in str(error)


def as_trained_on(trainer: pl.Trainer, batch: Any) -> Any:
    """Return a batch of a loader as the training loop gives it to the training step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


@contextmanager
def brought(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Bring modules to the device of a fit, from which Lightning takes its module to the CPU when the fit ends.

    Args:
        modules: Those that are on the CPU as a whole are brought, and taken back; others stay where they are.
        device: Of the fit.
    """
    here = [module for module in modules if {p.device.type for p in module.parameters()} == {"cpu"}]
    with undoing() as undo:
        if device.type != "cpu":
            for module in here:
                undo.add(module.cpu)
                module.to(device)
        yield
