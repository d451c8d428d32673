"""What a user sees of a module, a Trainer, a folder and the process: snapshots that are compared."""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(value: Any, deep: bool = True) -> Any:
    """Return what tells a value from another one, or from itself once it has changed."""
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
        return value
    if isinstance(value, dict) and deep:
        return tuple((fingerprint(key, False), fingerprint(item, False)) for key, item in value.items())
    if isinstance(value, list | tuple | set) and deep:
        return type(value), tuple(fingerprint(item, False) for item in value)
    return id(value)


def likeness(value: Any, deep: bool = True) -> Any:
    """Return what two runs of the same have in common of a value."""
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.dtype | torch.device):
        return value
    if isinstance(value, dict) and deep:
        return tuple((key if isinstance(key, str) else type(key), likeness(item, False)) for key, item in value.items())
    if isinstance(value, list | tuple) and deep:
        return type(value), tuple(likeness(item, False) for item in value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def parts_of(module: nn.Module, look: Callable[..., Any]) -> dict[tuple[str, str], Any]:
    """Return each submodule's class and attributes, its parameters' flags and hooks."""
    found: dict[tuple[str, str], Any] = {}
    for name, part in module.named_modules(remove_duplicate=False):
        found[name, "class"] = type(part)
        for key, value in vars(part).items():
            found[name, key] = look(value)
        for key, parameter in part._parameters.items():
            if parameter is not None:
                hooks = parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)
                found[name, f"{key} flags"] = parameter.requires_grad, *(len(h or ()) for h in hooks)
        config = getattr(part, "config", None)
        if hasattr(config, "to_dict"):
            found[name, "configuration"] = repr(config.to_dict())
    return found


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of a module's state and other buffers."""
    found = {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    return found | {name: value.clone() for name, value in module.named_buffers(remove_duplicate=False)}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for a, b in ((first[name], second[name]) for name in first)
    )


def trainer_of(trainer: Any, look: Callable[..., Any] = fingerprint) -> dict[tuple[str, str], Any]:
    """Return what a Trainer holds that a callback might have changed."""
    loop = trainer.fit_loop
    holders = {
        "trainer": trainer,
        "strategy": trainer.strategy,
        "fit loop": loop,
        "epoch loop": loop.epoch_loop,
        "automatic": loop.epoch_loop.automatic_optimization,
        "manual": loop.epoch_loop.manual_optimization,
        "val loop": loop.epoch_loop.val_loop,
        "checkpoint plugin": trainer.strategy.checkpoint_io,
        "precision plugin": trainer.strategy.precision_plugin,
    }
    return {(name, key): look(value) for name, holder in holders.items() for key, value in vars(holder).items()}


def process() -> dict[str, Any]:
    """Return what of the process must not change."""
    return {
        "gradients enabled": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "default type": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "log filters": len(logging.getLogger("lightning.pytorch.utilities.rank_zero").filters),
        "warnings": len(warnings.filters),
        "folder": os.getcwd(),
        "running threads": sorted(t.name for t in threading.enumerate() if t.name.startswith("fasc")),
        "progress bars": len(_bars()),
    }


def _bars() -> list[Any]:
    from tqdm.auto import tqdm

    return [bar for bar in getattr(tqdm, "_instances", ()) if not bar.disable]


def unfinished(folder: Path) -> list[str]:
    """Return the files of a folder that no run leaves: temporary, empty or damaged ones."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix in (".tmp", ".old") or path.name.startswith((".", "tmp", "fasc-")):
            found.append(name)
        elif path.suffix == ".ckpt":
            try:
                torch.load(path, weights_only=True)
            except Exception as error:
                found.append(f"{name}: {error}")
        elif path.suffix == ".safetensors":
            from safetensors import safe_open

            try:
                with safe_open(path, framework="pt") as handle:
                    list(handle.keys())
            except Exception as error:
                found.append(f"{name}: {error}")
    return found
