"""``FascTrainerCallback``: rho and compression in a Trainer of transformers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from transformers.trainer_callback import TrainerCallback
from typing_extensions import override

from fasc_lightning._run_fit import run_fit
from fasc_lightning._utils import TqdmWorkBar, Undo, undoing
from fasc_lightning.batches import LossScales, TokenRows, sampled_rows
from fasc_lightning.callback import FascCallback
from fasc_lightning.compression import CompressionReport, report_metrics
from fasc_lightning.dependence import (
    COLUMNS,
    CSV_FILE,
    RhoHistory,
    describe,
    draw_history,
    monitor_of,
    rho_metrics,
    save_figures,
)
from fasc_lightning.distributed import check_module
from fasc_lightning.layers import target_layers
from fasc_lightning.options import CompressionOptions, options_of
from fasc_lightning.planning import fit_forecast

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments

#: Training batches that calibrate, by default: with one sample each, as many as the recipes' windows.
BATCHES = 64

#: Entry of the history of rho in ``trainer_state.json``.
HISTORY = "fasc_rho_history"

#: Prefix of the model's names in a LightningModule that wraps it.
PREFIX = "model."


class FascTrainerCallback(CompressionOptions, TrainerCallback, pl.Callback):
    """Observe rho while a Trainer of transformers trains, compress the model at the end of ``train()``, or both.

    It takes the options of :class:`~fasc_lightning.FascCallback`, and serves subclasses of the Trainer as well, such as
    trl's SFTTrainer. After the last step, and after ``load_best_model_at_end`` has loaded the best weights, the model
    is calibrated as it is, with frozen weights, on batches of the training loader. The loss is the Trainer's own
    (``compute_loss``). ``trainer.save_model(folder)`` then writes a folder that loads again. If the compression fails,
    the model is as it was trained.

    ``calibration.steps`` is the number of batches of the calibration, 64 by default, and at most one epoch.
    ``calibration.update_weights`` is always False, and there is no ``recovery``.

    Means of rho and the totals of the compression go into the Trainer's log. ``rho_history.csv`` is written into
    ``args.output_dir`` with each checkpoint and at the end. Checkpoints hold the history, and a resumed training goes
    on with it.

    Example:
        >>> from fasc_lightning import FascTrainerCallback
        >>> smaller = FascTrainerCallback(size=0.27, monitor=50)  # Trainer(..., callbacks=[smaller])

    Attributes:
        report: The :class:`~fasc_lightning.compression.CompressionReport`, after ``train()``.
        rho_history: The observed rho, a :class:`~fasc_lightning.dependence.RhoHistory`.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If an option is of a wrong type.

    Note:
        It works on one device, and refuses several processes, DataParallel, DeepSpeed, FSDP and compiled models before
        the first step.
    """

    # Lightning accepts nothing but its own callbacks, and its own error names no remedy: `setup` does.

    def __post_init__(self) -> None:
        if self.recovery is not None:
            raise ValueError(
                "Expected no `recovery` in FascTrainerCallback but got one. HINT: recover(model, batches) trains the "
                "compressed model."
            )
        if self.compresses:
            self.update_weights = False
        super().__post_init__()
        self.report: CompressionReport | None = None
        self.rho_history = RhoHistory()
        self._monitor = monitor_of(self)
        self._scales = LossScales()
        self._undo = Undo()  # removes what an observed step puts on the Trainer
        self._trainer: Trainer | None = None
        self._module: _TrainedModule | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> NoReturn:
        """Refuse a Trainer of Lightning.

        Raises:
            TypeError: Always; it names the callback for that Trainer.
        """
        raise TypeError(
            "Expected a Trainer of transformers but FascTrainerCallback was given to a Trainer of Lightning. HINT: "
            "FascCallback, with the same options."
        )

    @property
    def _observes(self) -> bool:
        return self.monitor_every_n_steps is not None

    # Events, in the order of a training.

    @override
    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        check_arguments(args)

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._end()
        check_arguments(args)
        self._trainer = trainer = calling_trainer()
        self._module = _TrainedModule(trainer, kwargs["model"])
        self.report = None
        check_module(self._module, compresses=self.compresses)
        layers = target_layers(self._module, self.targets, self.exclude, compresses=self.compresses)
        if self.compresses:
            fit_forecast(self._module, self)  # refuses now what the end of the training would refuse
        if not self._observes:
            return
        self.rho_history = history_from(state)
        self._monitor = monitor_of(self)
        self._monitor.history = self.rho_history
        self._monitor.start(
            {name.removeprefix(PREFIX): layer for name, layer in layers.modules.items()}, state.global_step
        )

    @override
    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._monitor.due(state.global_step):
            assert self._trainer is not None
            # Training steps can fail, and no callback hears of it: so a wrapper that removes the hooks, itself put on
            # for this step alone.
            self._undo.set(self._trainer, "training_step", partial(self._observed, self._trainer.training_step))

    def _observed(
        self, step: Callable[..., Tensor], model: Any, inputs: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Run one training step of the Trainer, and observe it."""
        assert self._trainer is not None
        assert self._module is not None
        done = self._trainer.state.global_step
        try:
            rows = sampled_rows(
                self._module,
                inputs,
                label=f"a batch of step {done}",
                token_mask=self.token_mask,
                loss_terms=self.loss_terms,
                tokens=self.monitor_tokens,
                seed=self.seed,
            )
            self._monitor.begin_batch(done, self._trainer.args.device, rows)
            with undoing() as undo:
                undo.set(self._trainer, "compute_loss", partial(self._scaled, self._trainer.compute_loss, rows))
                loss = step(model, inputs, *args, **kwargs)
            self._monitor.end_batch()
        except BaseException:
            self._release()
            raise
        return loss

    def _scaled(self, compute: Callable[..., Any], rows: TokenRows, *args: Any, **kwargs: Any) -> Any:
        """Compute the Trainer's loss, and read the scale of its gradients from it."""
        found = compute(*args, **kwargs)
        self._scales.take(found[0] if isinstance(found, tuple) else found, rows, label=rows.label)
        return found

    @override
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rows = self._monitor.close()
        self._undo.close()
        if rows:
            assert self._trainer is not None
            self._trainer.log(rho_metrics(rows, self.rho_threshold, layers=self.log_layers is True))

    @override
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._keep_history(state, control)

    @override
    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._keep_history(state, control)

    def _keep_history(self, state: TrainerState, control: TrainerControl) -> None:
        """Put the history into the state if a checkpoint may follow; an evaluation may lead to one."""
        if self._observes and (control.should_save or control.should_evaluate):
            state.stateful_callbacks[HISTORY] = {  # type: ignore[call-overload, index]
                name: self.rho_history.column(name).tolist() for name in COLUMNS
            }

    @override
    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._observes:
            self._write(args)  # a run that is killed later keeps it

    @override
    def on_train_end(  # type: ignore[override]
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        try:
            if self._observes:
                of = self.rho_history, self.rho_threshold, self.emergence_observations
                folder = self._write(args)
                if folder is not None and self.rho_history:
                    save_figures(draw_history(*of), folder)
                rank_zero_info(f"\n{describe(*of)}")
            if self.compresses:
                self._compress(args, kwargs["train_dataloader"])
        finally:
            self._end()

    # The end.

    def _write(self, args: TrainingArguments) -> Path | None:
        """Write the table into the folder of the run, and return the folder; None if it cannot be written."""
        folder = Path(str(args.output_dir))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.rho_history.to_csv(folder / CSV_FILE)
        except OSError as error:  # training and its checkpoints matter more
            rank_zero_warn(f"The history of rho could not be written: {error}.")
            return None
        return folder

    def _compress(self, args: TrainingArguments, loader: Any) -> None:
        """Compress the trained model, and log the report."""
        trainer, module = self._trainer, self._module
        assert trainer is not None
        assert module is not None
        for callback in trainer.callback_handler.callbacks:  # ends the line of the Trainer's bar
            if (bar := getattr(callback, "training_bar", None)) is not None:
                bar.close()
        batches = list(islice(loader, self.calibration_steps or BATCHES))
        callback = FascCallback(**options_of(self, {"calibration_steps": None, "monitor_every_n_steps": None}))
        shown = not args.disable_tqdm
        with undoing() as undo:
            if (metrics := getattr(trainer, "_metrics", None)) is not None:  # trl's Trainers collect them at each loss
                undo.set(trainer, "_metrics", copy.deepcopy(metrics))
            run_fit(module, batches, callback, shown, bar=TqdmWorkBar("Calibration"), epochs=self.passes)
        assert callback.report is not None
        self.report = report = callback.report.without_prefix(PREFIX)
        # Optimizers hold the dense parameters; another `train()` makes new ones.
        trainer.optimizer = trainer.lr_scheduler = None
        trainer.log(report_metrics(report, layers=self.log_layers is True))
        if shown:
            rank_zero_info(f"\n{report}")
            rank_zero_info("Not saved yet: trainer.save_model(folder).")

    def _release(self) -> None:
        """Remove all hooks; safe at any time."""
        with undoing() as undo:
            undo.add(self._undo.close)
            undo.add(self._monitor.remove)

    def _end(self) -> None:
        """Drop the state of a training except its results; safe at any time."""
        with undoing() as undo:
            undo.add(self._release)
            undo.add(self._monitor.forget)
            undo.add(self._scales.forget)
        self._trainer = self._module = None


class _TrainedModule(pl.LightningModule):
    """The model of a Trainer of transformers with the Trainer's own loss.

    Args:
        trainer: The Trainer.
        model: Its model.
    """

    def __init__(self, trainer: Trainer, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._compute_loss = trainer.compute_loss

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        # A copy, since the Trainer's loss may take entries out.
        loss = self._compute_loss(self.model, {**batch} if isinstance(batch, Mapping) else batch)
        assert isinstance(loss, Tensor)  # as asked without `return_outputs`
        return loss

    def token_mask(self, batch: Any) -> Tensor | None:
        """Return True for the tokens that are not padding, shape (samples, length)."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        return mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)  # never steps: the weights are frozen


def calling_trainer() -> Trainer:
    """Return the Trainer that is calling a callback: transformers passes everything but the Trainer itself.

    Raises:
        MisconfigurationException: If no Trainer of transformers is calling.
    """
    from transformers import Trainer

    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(found := frame.f_locals.get("self"), Trainer):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    raise MisconfigurationException(
        "Expected a Trainer of transformers to call FascTrainerCallback but none does. HINT: Trainer(..., "
        "callbacks=[FascTrainerCallback(...)]), or compress(model, batches) without a Trainer."
    )


def check_arguments(args: TrainingArguments) -> None:
    """Refuse trainings whose layers cannot be read or replaced.

    Raises:
        MisconfigurationException: With the setting and the remedy.
    """
    unfit = {
        f"{args.world_size} processes": args.world_size > 1,
        f"DataParallel on {args.n_gpu} devices": args.n_gpu > 1,
        "DeepSpeed": bool(args.deepspeed),
        "FSDP": bool(args.fsdp),
        "torch_compile=True": bool(args.torch_compile),
    }
    if found := next((name for name, is_found in unfit.items() if is_found), None):
        raise MisconfigurationException(
            f"Expected a training on one device, uncompiled, for FascTrainerCallback but got {found}. HINT: train "
            "without it and then call compress(model, batches) on one device; CUDA_VISIBLE_DEVICES=0 hides the other "
            "devices. FascCallback in a Trainer of Lightning works in several processes."
        )


def history_from(state: TrainerState) -> RhoHistory:
    """Return the history of rho in the state of a resumed training; an empty one for a new training.

    Raises:
        ValueError: If the checkpoint holds something else in its place.
    """
    columns = state.stateful_callbacks.get(HISTORY)  # type: ignore[union-attr]
    if state.global_step == 0 or columns is None:
        return RhoHistory()
    try:
        rows = zip(*(columns[name] for name in COLUMNS), strict=True)
        return RhoHistory(dict(zip(COLUMNS, row, strict=True)) for row in rows)  # type: ignore[misc]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"Expected columns of observations under {HISTORY!r} in the checkpoint's trainer_state.json but {error}. "
            "HINT: remove the entry to begin a new history."
        ) from error
