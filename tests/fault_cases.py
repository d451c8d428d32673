"""Runs of the package small enough to be failed thousands of times, one for each of its ways through a fit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import expert_cases
import lightning.pytorch as pl
import torch
from faults import World, differences
from interrupted import every_batch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from snapshots import fingerprint, parts_of, trainer_of
from tiny import VOCABULARY, Tokens, causal_model
from torch import nn
from torch.utils.data import DataLoader

from fasc_lightning import CausalLMModule, Distillation, FascCallback, LoraRecovery, compress, quantize, recover, score
from fasc_lightning.calibration import _gathering, _sidecar
from fasc_lightning.statistics._cpu_offload import CpuOffload

BATCHES = 4

_SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def module_of(rate: float = 0.0, layers: int = 1, **options: Any) -> CausalLMModule:
    """A module whose weights stay what they are while it trains, so that they can be compared to the last bit."""
    model = causal_model("llama", **{**_SMALL, "num_hidden_layers": layers}).train()
    return CausalLMModule(model, learning_rate=rate, **options)


def loader(samples: int = BATCHES, **settings: Any) -> DataLoader:
    return DataLoader(Tokens(samples=2 * samples, length=8, **settings), batch_size=2)


class Watching(pl.Callback):
    """Notes what the Trainer holds when it begins to train."""

    def __init__(self, known: dict[str, Any]) -> None:
        self.known = known

    def on_fit_start(self, trainer, pl_module):
        strategy = trainer.strategy
        self.known.update(
            optimizers=list(strategy.optimizers),
            schedulers=list(strategy.lr_scheduler_configs),
            kinds=[type(config.scheduler) for config in strategy.lr_scheduler_configs],
        )


def trainer_with(folder: Path, *callbacks: pl.Callback, **options: Any) -> pl.Trainer:
    quiet = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def fit(
    folder: Path,
    *,
    module: Callable[[], nn.Module] = module_of,
    trainer: dict[str, Any] | None = None,
    callbacks: Callable[[Path], list[pl.Callback]] = lambda folder: [],
    validation: bool = False,
    batches: int = BATCHES,
    **options: Any,
) -> World:
    """A fit with a FascCallback of some options."""
    torch.manual_seed(0)
    folder = folder / "files"
    given = {name: value(folder) if callable(value) else value for name, value in (trainer or {}).items()}
    callback, known = FascCallback(**options), {}
    made, used = trainer_with(folder, Watching(known), callback, *callbacks(folder), **given), module()
    held = loader(1) if validation else None
    return World(lambda: made.fit(used, loader(batches), held), used, made, callback, folder, known)


class ByHand(CausalLMModule):
    """Steps its optimizer and scheduler itself."""

    def __init__(self) -> None:
        super().__init__(causal_model("llama", **_SMALL).train(), learning_rate=0.0, schedule="cosine")
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, loss = self.optimizers(), super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.lr_schedulers().step()


class Failing(pl.Callback):
    """Fails on its own, so that what is run then can fail as well."""

    def __init__(self, hook: str, at: int = 0) -> None:
        self.hook, self.at = hook, at
        setattr(self, hook, self._fail)

    def _fail(self, trainer, pl_module, *args, **unused):
        if self.hook != "on_train_batch_end" or args[-1] == self.at:
            raise InterruptedError(f"{self.hook} fails")


@cache
def _compressed(recovery: Any, refined: bool = False) -> tuple[nn.Module, FascCallback]:
    """A compressed module and its callback, before the fit that recovers."""
    torch.manual_seed(0)
    callback = FascCallback(
        rank=0.25, allocation="uniform", refit=False, update_weights=False, recovery=recovery, quantize=None
    )
    used = module_of(1e-2)
    trainer_with(Path("."), callback).fit(used, loader(6))
    return used, callback


def recovery(folder: Path, *, how: Any, validation: bool = False, **trainer: Any) -> World:
    """The second fit."""
    folder = folder / "files"
    used, callback = copy.deepcopy(_compressed(how))
    used.learning_rate = 1e-2
    torch.manual_seed(0)
    known: dict[str, Any] = {}
    given = {name: value(folder) if callable(value) else value for name, value in trainer.items()}
    more = given.pop("callbacks", [])
    made = trainer_with(folder, Watching(known), callback, *more, **given)
    held = loader(1) if validation else None
    return World(lambda: made.fit(used, loader(8), held), used, made, callback, folder, known)


def in_one_call(folder: Path, *, model: Callable[[], nn.Module], batches: Callable[[], list], **options: Any) -> World:
    torch.manual_seed(0)
    used = model()
    return World(lambda: compress(used, batches(), **options), used, folder=folder / "files")


def token_batches(count: int = BATCHES, samples: int = 2) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    return [{"input_ids": torch.randint(3, VOCABULARY, (samples, 8))} for _ in range(count)]


def small_model() -> nn.Module:
    model = causal_model("llama", **_SMALL).train()
    model.model.norm.weight.requires_grad_(False)
    model.lm_head.eval()
    return model


def scored(folder: Path) -> World:
    torch.manual_seed(0)
    used = small_model()
    return World(lambda: score(used, token_batches(2), tokens=16, progress=False), used, folder=folder / "files")


def recovered(folder: Path) -> World:
    used, _ = copy.deepcopy(_compressed(None))
    dense = module_of(1e-2)
    how = LoraRecovery(r=2, refine_steps=2, teacher=Distillation(weight=0.5))
    batches = token_batches(8)
    return World(
        lambda: recover(used.model, batches, how, dense=dense.model, progress=False), used.model, folder=folder
    )


def quantized(folder: Path) -> World:
    torch.manual_seed(0)
    used = expert_cases.make("mixtral")
    return World(lambda: quantize(used, "int8"), used)


def offloading(folder: Path, **options: Any) -> World:
    """As if the batches were on another device."""
    world = fit(folder, moments_device="cpu", **options)
    run, module = world.run, _gathering

    def patched() -> None:
        before = module.offloaded
        module.offloaded = lambda moments, device: CpuOffload(moments)
        try:
            run()
        finally:
            module.offloaded = before

    world.run = patched
    return world


def with_sidecars(folder: Path, **options: Any) -> World:
    """Every checkpoint has a sidecar."""
    world = fit(folder, callbacks=lambda files: [every_batch(files)], trainer={"enable_checkpointing": True}, **options)
    run = world.run

    def patched() -> None:
        before, _sidecar.SIDECAR_BYTES = _sidecar.SIDECAR_BYTES, 0
        try:
            run()
        finally:
            _sidecar.SIDECAR_BYTES = before

    world.run = patched
    return world


def resumed(folder: Path, **options: Any) -> World:
    """A fit that goes on from a checkpoint saved in the middle of its calibration."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    def data() -> Any:
        return StatefulDataLoader(Tokens(samples=2 * BATCHES, length=8), batch_size=2)

    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                raise InterruptedError

    first = folder / "first"
    torch.manual_seed(0)
    with suppress(InterruptedError):
        trainer_with(first, FascCallback(**options), Stop(), every_batch(first), enable_checkpointing=True).fit(
            module_of(), data()
        )
    world = fit(folder, callbacks=lambda files: [every_batch(files)], trainer={"enable_checkpointing": True}, **options)
    world.run = lambda: world.trainer.fit(world.module, data(), ckpt_path=first / "last.ckpt")
    return world


_NOT_TRAINED = {"update_weights": False}
_FROZEN = {"rank": 0.5, **_NOT_TRAINED}

LORA = LoraRecovery(r=2, validate_every=2)

SCENARIOS: dict[str, Callable[[Path], World]] = {
    "training": partial(fit, rank=0.5),
    "frozen": partial(
        fit,
        module=lambda: module_of(schedule="cosine", layers=2),
        refit=True,
        **_FROZEN,
    ),
    "by hand": partial(fit, module=ByHand, **_FROZEN),
    "monitoring": partial(
        fit,
        trainer={"logger": lambda folder: CSVLogger(folder), "log_every_n_steps": 1},
        validation=True,
        monitor_every_n_steps=1,
        monitor_tokens=16,
    ),
    "gate": partial(fit, gate=0.3, monitor_every_n_steps=2, monitor_tokens=16, refit=False, keep=0.6),
    "passes": partial(fit, trainer={"max_epochs": 2}, passes=2, **_FROZEN),
    "last steps": partial(
        fit,
        trainer={"max_epochs": 3},
        callbacks=lambda folder: [EarlyStopping("train_loss", patience=1)],
        calibration_steps=3,
        keep=0.6,
    ),
    "sketches": partial(fit, sketch="range", sketch_above=0, sketch_size=6, keep=0.5, refit=False),
    "projected": partial(fit, sketch="projected", refit=False, **_FROZEN),
    "int8": partial(fit, quantize="int8", refit=False, allocation="uniform", **_FROZEN),
    "rounded": partial(fit, size=0.4, refit=True, **_NOT_TRAINED),
    "offloaded": partial(offloading, refit=False, allocation="uniform", **_FROZEN),
    "checkpoints": partial(with_sidecars, **_FROZEN),
    "resumed": partial(resumed, **_FROZEN),
    "experts": partial(
        in_one_call, model=partial(expert_cases.make, "mixtral"), batches=expert_cases.batches, keep=0.6, progress=False
    ),
    "compress": partial(in_one_call, model=small_model, batches=token_batches, keep=0.6, progress=True),
    "compress and recover": partial(
        in_one_call,
        model=small_model,
        batches=partial(token_batches, 8),
        rank=0.25,
        recovery=LoraRecovery(r=2, refine_steps=2),
        progress=False,
    ),
    "adapters": partial(recovery, how=LORA),
    "factors": partial(recovery, how="factors", validation=True),
    "teacher": partial(recovery, how=LoraRecovery(r=2, teacher=Distillation(weight=0.5), validate_every=4)),
    "recover": recovered,
    "score": scored,
    "quantize": quantized,
}

#: Scenarios that fail on their own first.
FAILED: dict[str, Callable[[Path], World]] = {
    "a frozen batch fails": partial(
        fit,
        module=partial(module_of, schedule="cosine"),
        callbacks=lambda f: [Failing("on_train_batch_end", 2)],
        **_FROZEN,
    ),
    "the end of the fit fails": partial(fit, callbacks=lambda f: [Failing("on_fit_end")], quantize="int8", rank=0.5),
    "a recovery fails": partial(recovery, how=LORA, callbacks=lambda f: [Failing("on_train_batch_end", 2)]),
}


class Refusing(Tokens):
    """Fails when a sample is asked for."""

    def __getitem__(self, i):
        raise InterruptedError


#: Other states in which a scenario may leave a module, by runs that stop there.
STOPS: dict[str, Callable[[Path], World]] = {
    "compress and recover": partial(
        in_one_call,
        model=small_model,
        batches=partial(token_batches, 8),
        rank=0.25,
        recovery=LoraRecovery(r=2, refine_steps=2),
        recovery_data=DataLoader(Refusing(16), batch_size=2),
        progress=False,
    )
}


@cache
def ordinary(folder: Path) -> frozenset[tuple[str, str]]:
    """Return which attributes of a module and a Trainer fits without the package change, failing or not."""
    found: set[tuple[str, str]] = set()
    hooks = "none on_fit_start on_train_start on_train_batch_start on_before_backward on_train_batch_end"
    hooks += " on_validation_batch_start on_validation_epoch_end on_train_epoch_end on_train_end on_fit_end teardown"
    for hook in hooks.split():
        last = folder / "none" / "last.ckpt"
        for options in (
            {"callbacks": [EarlyStopping("train_loss", patience=1)], "max_epochs": 3, "min_steps": 10},
            {"logger": CSVLogger(folder), "log_every_n_steps": 1},
            {"callbacks": [every_batch(folder / hook)], "enable_checkpointing": True},
            {"ckpt_path": last, "max_epochs": 2},
        ):
            used, path = module_of(schedule="cosine"), options.pop("ckpt_path", None)
            more = options.pop("callbacks", []) + ([] if hook == "none" else [Failing(hook, 2)])
            made = trainer_with(folder, *more, **options)
            kept: list[Any] = []

            def look(value: Any, kept: list[Any] = kept) -> Any:
                kept.append(value)
                return fingerprint(value)

            before = {**parts_of(used, look), **trainer_of(made, look)}
            with suppress(InterruptedError):
                made.fit(used, loader(), loader(1), ckpt_path=path if path is not None and path.exists() else None)
            found |= set(differences(before, {**parts_of(used, fingerprint), **trainer_of(made)}))
    return frozenset(key for key in found if key[1] != "training")  # which a validation that fails leaves as it is
