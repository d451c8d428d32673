"""A fit that computes gradients but changes nothing: for calibrating a model as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fasc_lightning.sharding import is_sharded, reshard


class FrozenFit:
    """Holds a LightningModule still while its Trainer goes through batches.

    Between :meth:`enter` and :meth:`exit` the module is in eval mode (no dropout, no running statistics), no parameter
    requires a gradient (so none is computed; taps carry the gradient to the layers), optimizers and schedulers do not
    step, and DDP does not synchronise. Everything is put back afterwards.

    The optimizer step is intercepted at the strategy, where automatic and manual optimisation meet, before precision
    plugins unscale or clip anything.
    """

    def __init__(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._training: dict[nn.Module, bool] = {}
        self._requires_grad: dict[nn.Parameter, bool] = {}
        self._grad_sync: bool | None = None
        self._schedulers: list[tuple[Any, type]] = []
        self._lent: Tensor | None = None
        self.active = False

    def enter(self) -> None:
        """Freeze."""
        if self.active:
            return
        self.active = True
        reshard(self._module)  # of weights still gathered, a flag would not outlast the batch
        self._training = {module: module.training for module in self._module.modules()}
        self._requires_grad = {p: p.requires_grad for p in self._module.parameters()}
        for parameter in self._requires_grad:
            parameter.requires_grad_(False)
            parameter.grad = None
        self._module.eval()
        strategy, epoch_loop = self._trainer.strategy, self._trainer.fit_loop.epoch_loop
        strategy.optimizer_step = _run_closure_only  # type: ignore[method-assign]
        epoch_loop.update_lr_schedulers = _no_step  # type: ignore[method-assign]
        # For those that manual optimisation steps itself. An attribute would go into checkpoints: it is state.
        self._schedulers = [(c.scheduler, type(c.scheduler)) for c in strategy.lr_scheduler_configs]
        for scheduler, kind in self._schedulers:
            scheduler.__class__ = type(kind.__name__, (kind,), {"step": _no_step})
        if isinstance(strategy.model, DistributedDataParallel):
            # No parameter has a gradient to average; DDP's reducer would wait for them.
            self._grad_sync = strategy.model.require_backward_grad_sync
            strategy.model.require_backward_grad_sync = False
        if is_sharded(self._module):
            strategy.optimizer_state = self._optimizer_state  # type: ignore[method-assign]

    def hold(self) -> None:
        """Freeze again what a validation loop or the user's own hooks set to training mode."""
        if self.active and any(module.training for module in self._module.modules()):
            self._module.eval()

    def exit(self) -> None:
        """Put everything back; safe to call at any time, any number of times."""
        if not self.active:
            return
        self.active = False
        self.take_gradient_back()
        for module, training in self._training.items():
            module.training = training
        for parameter, requires_grad in self._requires_grad.items():
            parameter.requires_grad_(requires_grad)
        strategy, epoch_loop = self._trainer.strategy, self._trainer.fit_loop.epoch_loop
        for name in ("optimizer_step", "optimizer_state"):
            vars(strategy).pop(name, None)
        vars(epoch_loop).pop("update_lr_schedulers", None)
        for scheduler, kind in self._schedulers:
            scheduler.__class__ = kind
        if self._grad_sync is not None and isinstance(strategy.model, DistributedDataParallel):
            strategy.model.require_backward_grad_sync = self._grad_sync
        self._training, self._requires_grad, self._schedulers, self._grad_sync = {}, {}, [], None

    def lend_gradient(self, loss: Tensor) -> None:
        """Give a loss without a graph something for the Trainer's backward pass to do.

        The loss of a frozen module has no graph where it reaches no tapped layer: on some batches of alternating
        tasks, or for the discriminator of a GAN.

        Args:
            loss: Of the batch, as the backward pass gets it.
        """
        if self.active and not loss.requires_grad:
            loss.requires_grad_(True)
            self._lent = loss

    def take_gradient_back(self) -> None:
        """Undo :meth:`lend_gradient`; safe at any time."""
        if self._lent is not None:
            self._lent.grad = None
            self._lent.requires_grad_(False)
            self._lent = None

    def _optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Stand in for ``Strategy.optimizer_state`` of sharded weights.

        Its checkpoints hold what an optimizer keeps of the parameters that require gradients, and reading one asks for
        those that require gradients then: the parameters of a fit that begins.
        """
        for parameter, requires_grad in self._requires_grad.items():
            parameter.requires_grad_(requires_grad)
        try:
            strategy = self._trainer.strategy
            return type(strategy).optimizer_state(strategy, optimizer)
        finally:
            for parameter in self._requires_grad:
                parameter.requires_grad_(False)


def _run_closure_only(optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
    """Stand in for ``Strategy.optimizer_step``: forward and backward, no step."""
    del optimizer, model, kwargs
    return closure()


def _no_step(*args: Any, **kwargs: Any) -> None:
    """Stand in for the training loop's ``update_lr_schedulers``, and for a scheduler's ``step``."""
    del args, kwargs
