"""The callback of a recovery fit, which trains a compressed module's factors or adapters on them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from fasc_lightning._utils import Undo, peak_memory_bytes, undoing
from fasc_lightning.batches import (
    LossTerms,
    TokenMask,
    batch_mask,
    check_automatic,
    count_tokens,
    loss_terms_of,
    reads_loss,
    restore_loaders,
)
from fasc_lightning.compression import check_recovery_state, recovery_line, sealed
from fasc_lightning.distributed import check_module, check_strategy, sum_everywhere
from fasc_lightning.layers import compressed_layers, is_compressed, is_plain_linear
from fasc_lightning.options import LoraRecovery, Recovery, as_recovery, checks_options
from fasc_lightning.recovery._adapters import Adapters, put_values
from fasc_lightning.recovery._best_state import BestState
from fasc_lightning.recovery._checks import check_optimizers, check_recoverable
from fasc_lightning.recovery._last_checkpoint import saves_on_exception, set_aside_optimizers
from fasc_lightning.recovery._teacher_phase import TeacherPhase
from fasc_lightning.recovery._trained import train_factors
from fasc_lightning.recovery._validation import HeldOutSplit, held_out_batches, held_out_loss, validates

#: Number of measurements of the held-out loss in a fit, by default.
LOOKS = 8

#: Last sentence of the error about modules whose training step returns no loss.
REMEDY = "Recovery looks at the loss of held-out batches: let Lightning step the optimizer."

#: The recovery's entry in a callback's state.
_KEY = "recovery"


class RecoveryCallback(pl.Callback):
    """Recovers a compressed module in a fit; :class:`~fasc_lightning.FascCallback` has one for its second fit.

    Only the trained parameters require gradients, so ``configure_optimizers`` should give them to an optimizer. The
    loss of the training step on held-out batches decides which state is kept, whatever other callbacks put into the
    module in the end. Held-out batches are the Trainer's validation batches, or else every eighth sample of the
    training loader, 64 at most. If no state is better than the first, the factors stay and a warning is logged. When
    the fit ends, adapters are merged and ``requires_grad`` flags are restored. A failed fit restores the whole module.

    Checkpoints during the fit hold the state of the merged model and the state that a resumed fit needs.

    Args:
        recovery: "lora", "factors", or their options.
        dense: The dense layers by name, for a teacher.
        seed: Seed of the adapters' start.
        token_mask: Function that returns the mask of real tokens, as for :class:`~fasc_lightning.FascCallback`.
        loss_terms: Reduction of the loss, as for :class:`~fasc_lightning.FascCallback`.
        key: Key of the callback's state in checkpoints; None takes the class's name.
        teacher: Fingerprint of ``dense``, if known.
        failed: Collects what a failed fit has to undo, for a caller with more to undo; None if there is no such caller.

    Attributes:
        figures: Figures of the recovery after the fit, in plain types.
    """

    @checks_options
    def __init__(
        self,
        recovery: Literal["lora", "factors"] | Recovery,
        dense: dict[str, nn.Module] | None = None,
        *,
        seed: int = 0,
        token_mask: TokenMask | None = None,
        loss_terms: LossTerms | None = None,
        key: str | None = None,
        teacher: str | None = None,
        failed: Undo | None = None,
    ) -> None:
        options = as_recovery(recovery)
        if options is None:
            raise ValueError("Expected `recovery` to say what is trained but got None. HINT: recovery='lora'.")
        self.recovery: Recovery = options
        self.dense = {} if dense is None else dense
        self.seed = seed
        self.token_mask = token_mask
        self.loss_terms = loss_terms
        self.figures: dict[str, Any] | None = None
        self._key = key
        self._fingerprint = teacher
        self._undo = Undo()
        self._failed = Undo() if failed is None else failed
        self._forget()

    def _forget(self) -> None:
        self.active = False
        self._adapters: Adapters | None = None
        self._teacher: TeacherPhase | None = None
        self._source: HeldOutSplit | None = None
        self._initial: dict[str, Tensor] = {}
        self._best = BestState(self.recovery.patience)
        self._start = 0  # global step at which the recovery began
        self._tokens = self._tokens_before = 0
        self._seconds, self._began = 0.0, time.perf_counter()
        self._diverged: int | None = None
        self._ended = False
        self._batch_norms: list[nn.Module] = []
        self._linear: dict[str, nn.Module] = {}
        self._load_hook = Undo()
        self._snapshot: tuple[dict[str, Tensor], dict[str, Any]] | None = None

    @property
    @override
    def state_key(self) -> str:
        return self._key or type(self).__qualname__

    # Phases, in the order of a fit.

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._put_back()  # a failed fit may have left something
            self._load_hook.close()
            self._forget()
            self.figures = None
            check_strategy(trainer)
            check_module(pl_module, compresses=False)
            if is_compressed(pl_module):
                self.begin(trainer, pl_module)
            elif not self.dense:  # a checkpoint may be about to replace these layers
                self._linear = {name: m for name, m in pl_module.named_modules() if is_plain_linear(m)}

            def undo(loaded: nn.Module, *unused: Any) -> None:
                if self.active and loaded is pl_module:  # not a copy of it
                    self._put_back()

            # No hook of Lightning precedes the load of a checkpoint, which holds the weights of a plain module.
            self._load_hook.hook(pl_module.register_load_state_dict_pre_hook, undo)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn == "fit":
            found = not self.dense
            self.dense.update(self._linear if found else {})
            self.begin(trainer, pl_module, checkpoint["callbacks"].get(self.state_key, {}).get(_KEY), found=found)

    def begin(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        state: Mapping[str, Any] | None = None,
        found: bool = False,
    ) -> None:
        """Freeze all but the trained parameters, before the optimizers are made and DDP wraps the module.

        Args:
            trainer: Trainer of the fit.
            pl_module: Module of the fit, compressed.
            state: The recovery's state in the checkpoint of a resumed fit, if it has one.
            found: Whether the dense layers come from the module of a resumed fit, which may hold any weights.

        Raises:
            MisconfigurationException: If the module cannot be recovered.
            ValueError: If the state belongs to a recovery with other options.
        """
        check_recoverable(pl_module, self.recovery)
        check_automatic(pl_module, REMEDY)
        if state is not None:
            check_recovery_state(state)
        if state is not None and state["arm"] != self.recovery.arm:
            raise ValueError(
                f"Expected a checkpoint of a recovery of {self.recovery.arm!r} but it is one of {state['arm']!r}."
            )
        teacher = self.recovery.distillation
        if teacher is not None:
            self._teacher = TeacherPhase(pl_module, self.dense, teacher, self.token_mask)
            expected = self._fingerprint if state is None else state["teacher"]
            self._teacher.check(expected, found=found)
        self.active = True
        with undoing() as undo:
            undo.add(self._put_back)
            self._failed.add(self._undo.close)
            if not validates(trainer):
                self._source = HeldOutSplit(trainer.fit_loop._data_source)
                self._undo.set(trainer.fit_loop, "_data_source", self._source)
            self._undo.add(pl_module.zero_grad)
            self._undo.keep_flags(pl_module)
            self._undo.keep_modes(pl_module)
            if state is not None:
                put_values(pl_module, state["initial"])
            self._freeze(pl_module)
            if state is not None:
                put_values(pl_module, state["current"])
                self._load(state)
            undo.forget()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._linear = {}
        self._load_hook.close()
        if not self.active:  # resumed from a checkpoint without states of callbacks
            self.begin(trainer, pl_module)
        check_optimizers(trainer, self._trained(pl_module))
        if self._teacher is not None:
            self._undo.add(self._teacher.release)
            self._teacher.start(trainer, pl_module, self._initial)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        restore_loaders(trainer)
        self._began = time.perf_counter()
        self._batch_norms = [m for m in pl_module.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        if not self._best.begun:
            self._start = trainer.global_step
        if self._teacher is not None:
            self._teacher.fill(trainer, pl_module, held_out_batches(trainer, self._source))
        self._every = self._interval(trainer)
        if not self._best.begun:
            self._look(trainer, pl_module)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        for module in self._batch_norms:  # running statistics are frozen, as is everything that is not trained
            module.training = False
        self._tokens += count_tokens(batch, batch_mask(pl_module, batch, self.token_mask))

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        # A GradScaler skips steps that overflow by itself.
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return
        gradients = [p.grad for p in self._trained(pl_module).values() if p.grad is not None]
        # Every process decides the same, since gradients have been averaged.
        if gradients and not bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all()):
            optimizer.zero_grad(set_to_none=True)
            self._diverge(trainer, "a gradient", "look at the batch")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step - self._start
        if self._every is not None and step % self._every == 0:
            self._look(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._every is None:
            self._look(trainer, pl_module)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer, pl_module)
        self._put_best(pl_module)
        self._ended = True
        self._seconds += time.perf_counter() - self._began
        self._tokens = self._tokens_before = self._tokens_everywhere(trainer)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._best.begun:
            raise MisconfigurationException(
                "Expected at least one batch to recover on but the fit ended without any: is the dataloader empty, or "
                "had the Trainer finished before? The model is compressed and not recovered."
            )
        if not self._ended:  # a resumed fit had nothing left to train: training neither started nor ended
            pl_module.to(trainer.strategy.root_device)
            self._look(trainer, pl_module)
        best = self._best
        self._put_best(pl_module)  # callbacks that average weights may have replaced the values
        trained = sum(p.numel() for p in self._trained(pl_module).values())
        self._failed.add(setattr, self, "figures", None)
        self.figures = {
            "arm": self.recovery.arm,
            "teacher": self.recovery.distillation is not None,
            "tokens": self._tokens,
            "seconds": self._seconds,
            "trained_parameters": trained,
            "held_out_loss": {"before": best.first, "after": best.loss},
            "history": [[step - self._start, loss] for step, loss in best.losses],
            "steps": trainer.global_step - self._start,
            "best_step": best.step - self._start,
            "reverted": not best.improved,
            "diverged_at": self._diverged,
            "peak_memory_bytes": peak_memory_bytes(trainer.strategy.root_device),
        }
        if self._adapters is not None:
            bases = {name: value.clone() for name, value in self._adapters.bases().items()}
            self._failed.add(put_values, pl_module, bases)
            self._adapters.take_off(merge=best.improved)
        self._undo.close()
        self._initial, self.active = {}, False
        self._failed.keep(pl_module, attributes=True)
        # The optimizers hold adapters that are gone, or moments of other values than the last ones.
        set_aside_optimizers(trainer, self._failed)
        outcome = recovery_line(self.figures)
        if best.improved:
            rank_zero_info(f"FascCallback: {outcome}.")
        else:
            rank_zero_warn(f"{outcome[:1].upper()}{outcome[1:]}.")

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        with undoing() as undo:
            undo.add(self._put_back)
            undo.add(self._load_hook.close)
            if self.active and saves_on_exception(trainer) and self._best.begun:  # checkpoints are saved after this
                # Other processes can no longer be asked for their counts.
                tokens = self._tokens_before + (self._tokens - self._tokens_before) * trainer.world_size
                self._snapshot = self._saved(pl_module, tokens)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.figures is not None:
            self._failed.forget()
        self._load_hook.close()
        self._put_back()

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._snapshot is not None:
            weights, state = self._snapshot
            checkpoint["state_dict"].update(weights)
        elif self.active and self._best.begun:
            state = self._state(pl_module, self._tokens_everywhere(trainer))
        else:
            return
        checkpoint["callbacks"].setdefault(self.state_key, {})[_KEY] = state

    # Parts of the phases.

    def _freeze(self, pl_module: pl.LightningModule) -> None:
        """Make the trained parameters the only ones that require gradients."""
        for parameter in pl_module.parameters():
            parameter.requires_grad_(False)
        if isinstance(self.recovery, LoraRecovery):
            self._adapters = Adapters(pl_module, self.recovery.lora_config(), self.seed)
            self._undo.add(self._adapters.take_off, merge=False)
            self._adapters.put_on()
        else:
            train_factors(pl_module, self.recovery, self._undo)
        self._initial = {n: p.detach().clone() for n, p in self._trained(pl_module).items()}
        if self._adapters is None:
            self._failed.add(put_values, pl_module, self._initial)

    @staticmethod
    def _trained(pl_module: pl.LightningModule) -> dict[str, nn.Parameter]:
        return {name: p for name, p in pl_module.named_parameters() if p.requires_grad}

    def _interval(self, trainer: pl.Trainer) -> int | None:
        """Return the steps between measurements of the held-out loss; None measures at the end of every epoch."""
        if self.recovery.validate_every is not None:
            return self.recovery.validate_every
        steps = trainer.estimated_stepping_batches
        # Lightning returns infinity, or -1, if a loader's length is not known.
        return max(1, (int(steps) - self._start) // LOOKS) if 0 <= steps < math.inf else None

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the held-out loss of the present state, unless it has been measured."""
        step = trainer.global_step
        if self._diverged is not None or (self._best.begun and self._best.losses[-1][0] == step):
            return
        with nullcontext() if self._adapters is None else self._adapters.as_kept():
            loss = held_out_loss(
                trainer,
                pl_module,
                held_out_batches(trainer, self._source),
                lambda batch, loss: loss_terms_of(
                    pl_module, batch, token_mask=self.token_mask, loss_terms=self.loss_terms, loss=loss
                ),
                partial(reads_loss, pl_module, token_mask=self.token_mask, loss_terms=self.loss_terms),
            )
        if not math.isfinite(loss):
            if not self._best.begun:
                raise FloatingPointError(
                    f"Expected a finite held-out loss before the recovery but got {loss}. Check the held-out batches."
                )
            self._diverge(trainer, "the held-out loss", "clip gradients")
        self._best.look(step, loss, self._trained(pl_module))
        for logger in trainer.loggers:
            logger.log_metrics({f"fasc{logger.group_separator}recovery_loss": loss}, step=step)
        if self._best.exhausted:
            trainer.should_stop = True

    def _diverge(self, trainer: pl.Trainer, what: str, remedy: str) -> None:
        if self._diverged is None:
            self._diverged = trainer.global_step - self._start
            rank_zero_warn(
                f"{what[:1].upper()}{what[1:]} is not finite after {self._diverged} steps of the recovery, which stops "
                f"here and keeps the best state before. HINT: a lower learning rate, or {remedy}."
            )
        trainer.should_stop = True

    def _put_best(self, pl_module: pl.LightningModule) -> None:
        put_values(pl_module, self._best.values if self._best.improved else self._initial)

    def _tokens_everywhere(self, trainer: pl.Trainer) -> int:
        """Return the number of tokens of all processes; all have to call this together."""
        return self._tokens_before + sum_everywhere(trainer, self._tokens - self._tokens_before)

    def _state(self, pl_module: pl.LightningModule, tokens: int) -> dict[str, Any]:
        """Return the state for a resumed fit, in plain data and tensors."""
        state = {
            "arm": self.recovery.arm,
            "initial": self._initial if self._adapters is None else self._adapters.bases(),
            "current": {name: p.detach() for name, p in self._trained(pl_module).items()},
            "best": self._best.state_dict(),
            "start": self._start,
            "tokens": tokens,
            "seconds": self._seconds + time.perf_counter() - self._began,
            "teacher": None if self._teacher is None else self._teacher.fingerprint,
        }
        return sealed(state)

    def _saved(self, pl_module: pl.LightningModule, tokens: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the weights and the state for a checkpoint that is saved after everything is undone."""
        copies = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), self._state(pl_module, tokens))
        names = tuple(f"{name}." for name in compressed_layers(pl_module))
        changed = {
            key: value.detach().clone()
            for key, value in pl_module.state_dict().items()
            if key in self._initial or key.startswith(names)
        }
        return changed, copies

    def _load(self, state: Mapping[str, Any]) -> None:
        self._best.load_state_dict(state["best"])
        self._start, self._seconds = state["start"], state["seconds"]
        self._tokens = self._tokens_before = state["tokens"]

    def _put_back(self) -> None:
        """Restore the module as it was before the recovery, unless the recovery is over; safe at any time."""
        with self._failed, self._undo:
            self.active = False
        self._initial = {}
