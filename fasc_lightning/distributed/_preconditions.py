"""Checks of the strategy, the callbacks and the module before a fit begins."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fasc_lightning.distributed._device_map import DeviceMapStrategy
from fasc_lightning.distributed._fsdp import check_mesh
from fasc_lightning.layers import is_compressed


def check_namespace(*used: object) -> None:
    """Refuse Trainers and modules of the package ``pytorch_lightning``: their classes are others of the same names.

    Args:
        *used: Trainers and modules.

    Raises:
        MisconfigurationException: If one is of ``pytorch_lightning``; the message names the right import.
    """
    for thing in used:
        kind = type(thing)
        roots = {base.__module__.partition(".")[0] for base in kind.__mro__}
        if "pytorch_lightning" in roots and "lightning" not in roots:
            raise MisconfigurationException(
                f"Expected a Trainer and a LightningModule of the package `lightning` but {kind.__name__} is of "
                "`pytorch_lightning`, whose classes have the same names and are others. HINT: `import "
                "lightning.pytorch as pl` in place of `import pytorch_lightning as pl`, everywhere in the program."
            )


def check_strategy(trainer: pl.Trainer, recovers: bool = False) -> None:
    """Refuse strategies under which layers cannot be read or replaced.

    Args:
        trainer: Trainer of a fit.
        recovers: Whether the fit trains a compressed module.

    Raises:
        MisconfigurationException: With the strategy and the remedy; or as :func:`check_namespace`.
    """
    check_namespace(trainer)
    strategy, name = trainer.strategy, type(trainer.strategy).__name__
    launcher = strategy.launcher
    if isinstance(launcher, _MultiProcessingLauncher):
        raise MisconfigurationException(
            f"Expected a fit in this process or in processes of the same script but {name} (ddp_"
            f"{launcher._start_method}) is launched by {type(launcher).__name__}: the layers would be swapped in the "
            "workers and lost with them. HINT: use strategy='ddp' from a script (not a notebook), or one device."
        )
    # By exact type: DeepSpeedStrategy is a DDPStrategy.
    if type(strategy) not in (SingleDeviceStrategy, DeviceMapStrategy, DDPStrategy, ModelParallelStrategy):
        raise MisconfigurationException(
            f"Expected a single device, strategy='ddp' or ModelParallelStrategy with FSDP2 but got {name}, which "
            "shards or wraps the layers in a way of its own. HINT: compress on one device or under 'ddp' (a "
            "calibration epoch needs no optimizer state with update_weights=False), then train the compressed model "
            "under the strategy of your choice."
        )
    if isinstance(strategy, ModelParallelStrategy):
        if recovers:
            raise MisconfigurationException(
                f"Expected a single device or strategy='ddp' for a recovery but got {name}, which shards the "
                "low-rank layers. HINT: they are a fraction of the dense ones; recover under 'ddp', or without "
                "`recovery` train them under the strategy of your choice."
            )
        check_mesh(strategy)


def check_single(callbacks: Sequence[pl.Callback]) -> None:
    """Refuse more than one callback with a budget.

    Raises:
        MisconfigurationException: If there are several.
    """
    if len(callbacks) > 1:
        raise MisconfigurationException(
            "Expected one FascCallback with a budget in a fit but got several: each would freeze and restore the "
            "weights of the others. HINT: one callback spends one budget over all its `targets`."
        )


def check_module(pl_module: pl.LightningModule, compresses: bool = True) -> None:
    """Refuse compiled modules, and for compression also modules with adapters or compressed layers.

    Args:
        pl_module: The module of the fit.
        compresses: Whether it is compressed, or only monitored.

    Raises:
        MisconfigurationException: With the remedy; or as :func:`check_namespace`.
    """
    check_namespace(pl_module)
    compiled = [
        name
        for name, m in pl_module.named_modules()
        if isinstance(m, torch._dynamo.OptimizedModule) or m._compiled_call_impl is not None
    ]
    if compiled or pl_module._compiler_ctx is not None:
        raise MisconfigurationException(
            f"Expected a module that is not compiled but {compiled[0] if compiled else 'the LightningModule'!r} is: "
            "hooks added after compilation are ignored silently. HINT: fit the original module and compile the "
            "compressed one."
        )
    if not compresses:
        return
    adapters = [name for name, m in pl_module.named_modules() if hasattr(m, "lora_A") or hasattr(m, "base_layer")]
    if adapters:
        raise MisconfigurationException(
            f"Expected a module without adapters but {adapters[0]!r} carries some: the base layer and the adapter "
            "would be compressed separately. HINT: merge them first (`merge_and_unload()` of peft)."
        )
    if is_compressed(pl_module):
        raise MisconfigurationException(
            f"{type(pl_module).__name__} holds compressed layers already, and compressing twice loses quality without "
            "gain. HINT: start from the dense model. To train the factors, use `recover`, or leave FascCallback out."
        )
