"""A fit that computes gradients but changes nothing: for calibrating a model as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fasc_lightning._utils import Undo, undoing
from fasc_lightning.distributed import is_sharded, reshard


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
        self._requires_grad: dict[nn.Parameter, bool] = {}
        self._lent: Tensor | None = None
        self._undo = Undo()
        self.active = False

    def enter(self) -> None:
        """Freeze."""
        if self.active:
            return
        self.active = True
        reshard(self._module)  # of weights still gathered, a flag would not outlast the batch
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
        # For those that manual optimisation steps itself. An attribute would go into checkpoints: it is state.
        for scheduler in [config.scheduler for config in strategy.lr_scheduler_configs]:
            kind = type(scheduler)
            undo.set(scheduler, "__class__", type(kind.__name__, (kind,), {"step": _no_step}))
        if isinstance(strategy.model, DistributedDataParallel):
            # No parameter has a gradient to average; DDP's reducer would wait for them.
            undo.set(strategy.model, "require_backward_grad_sync", False)
        if is_sharded(self._module):
            undo.set(strategy, "optimizer_state", self._optimizer_state)

    def hold(self) -> None:
        """Freeze again what a validation loop or the user's own hooks set to training mode."""
        if self.active and any(module.training for module in self._module.modules()):
            self._module.eval()

    def exit(self) -> None:
        """Put everything back; safe to call at any time, any number of times."""
        self._undo.close()
        self.active, self._requires_grad = False, {}

    def lend_gradient(self, loss: Tensor) -> None:
        """Give a loss without a graph something for the Trainer's backward pass to do.

        The loss of a frozen module has no graph where it reaches no tapped layer: on some batches of alternating
        tasks, or for the discriminator of a GAN.

        Args:
            loss: Of the batch, as the backward pass gets it.
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
        """Stand in for ``Strategy.optimizer_state`` of sharded weights.

        Its checkpoints hold what an optimizer keeps of the parameters that require gradients, and reading one asks for
        those that require gradients then: the parameters of a fit that begins.
        """
        strategy = self._trainer.strategy
        with undoing() as undo:
            undo.keep_flags(self._module)
            for parameter, requires_grad in self._requires_grad.items():
                parameter.requires_grad_(requires_grad)
            return type(strategy).optimizer_state(strategy, optimizer)


def _run_closure_only(optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
    """Stand in for ``Strategy.optimizer_step``: forward and backward, no step."""
    del optimizer, model, kwargs
    return closure()


def _no_step(*args: Any, **kwargs: Any) -> None:
    """Stand in for the training loop's ``update_lr_schedulers``, and for a scheduler's ``step``."""
    del args, kwargs
