"""A fit that computes gradients but changes no weights, for the calibration of a model as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fasc_lightning._utils import Undo, undoing
from fasc_lightning.distributed import is_sharded, reshard


class FrozenFit:
    """Freezes a LightningModule while its Trainer goes through batches.

    Between :meth:`enter` and :meth:`exit` the module is in eval mode (no dropout, no running statistics). No parameter
    requires a gradient, so no weight gradient is computed; taps carry the gradient to the layers. Optimizers and
    schedulers do not step, and DDP does not synchronise. Everything is restored afterwards.

    The optimizer step is intercepted at the strategy, which automatic and manual optimisation share, before precision
    plugins unscale or clip gradients.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._requires_grad: dict[nn.Parameter, bool] = {}
        self._lent: Tensor | None = None
        self._undo = Undo()
        self.active = False

    def enter(self) -> None:
        """Freeze the module."""
        if self.active:
            return
        self.active = True
        reshard(self._module)  # flags of gathered weights would not outlast the batch
        self._requires_grad = {p: p.requires_grad for p in self._module.parameters()}
        self._undo.keep_modes(self._module)
        self._undo.keep_flags(self._module)
        for parameter in self._requires_grad:
            parameter.requires_grad_(False)
            parameter.grad = None
        self._module.eval()
        strategy, undo = self._trainer.strategy, self._undo
        undo.set(strategy, "optimizer_step", _run_closure_only)
        undo.set(self._trainer.fit_loop.epoch_loop, "update_lr_schedulers", _no_step)
        # Manual optimisation steps its schedulers itself. An attribute of theirs would go into checkpoints as state.
        for scheduler in [config.scheduler for config in strategy.lr_scheduler_configs]:
            kind = type(scheduler)
            undo.set(scheduler, "__class__", type(kind.__name__, (kind,), {"step": _no_step}))
        if isinstance(strategy.model, DistributedDataParallel):
            # No parameter has a gradient to average, and DDP's reducer would wait for one.
            undo.set(strategy.model, "require_backward_grad_sync", False)
        if is_sharded(self._module):
            undo.set(strategy, "optimizer_state", self._optimizer_state)

    def hold(self) -> None:
        """Freeze the module again after a validation loop or the user's own hooks set training mode."""
        if self.active and any(module.training for module in self._module.modules()):
            self._module.eval()

    def exit(self) -> None:
        """Restore everything; safe to call at any time, any number of times."""
        self._undo.close()
        self.active, self._requires_grad = False, {}

    def lend_gradient(self, loss: Tensor) -> None:
        """Let a loss without a graph require a gradient, so that the Trainer's backward pass does not fail.

        The loss of a frozen module has no graph if it reaches no tapped layer: on some batches of alternating tasks, or
        for the discriminator of a GAN.

        Args:
            loss: Loss of the batch, as the backward pass gets it.
        """
        if self.active and not loss.requires_grad:
            self._lent = loss
            self._undo.add(self.take_gradient_back)
            loss.requires_grad_(True)

    def take_gradient_back(self) -> None:
        """Undo :meth:`lend_gradient`; safe at any time."""
        if self._lent is not None:
            self._lent.grad = None
            self._lent.requires_grad_(False)
            self._lent = None

    def _optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Replace ``Strategy.optimizer_state`` of sharded weights.

        A sharded checkpoint holds the optimizer state of parameters that require gradients. Reading it asks for the
        parameters that require gradients at that time: at the start of a fit. So the flags are restored meanwhile.
        """
        strategy = self._trainer.strategy
        with undoing() as undo:
            undo.keep_flags(self._module)
            for parameter, requires_grad in self._requires_grad.items():
                parameter.requires_grad_(requires_grad)
            return type(strategy).optimizer_state(strategy, optimizer)


def _run_closure_only(optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
    """Replace ``Strategy.optimizer_step``: forward and backward, no step."""
    del optimizer, model, kwargs
    return closure()


def _no_step(*args: Any, **kwargs: Any) -> None:
    """Replace the training loop's ``update_lr_schedulers``, and a scheduler's ``step``."""
    del args, kwargs
