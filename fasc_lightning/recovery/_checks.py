"""Checks of modules and optimizers before a recovery."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from fasc_lightning.layers import CompressedLinear, compressed_layers, quantization_of
from fasc_lightning.options import LoraRecovery, Recovery
from fasc_lightning.recovery._adapters import carries_adapters, factor_names
from fasc_lightning.recovery._distillation import check_distillable


def check_recoverable(pl_module: pl.LightningModule, recovery: Recovery) -> None:
    """Check that recovery can train a module, before anything is changed.

    Raises:
        MisconfigurationException: If the module is not compressed, carries adapters, is in int8, or cannot learn from
            a teacher.
        ValueError: If the patterns of a LoraConfig match no compressed layer.
    """
    layers = compressed_layers(pl_module)
    if not layers:
        raise MisconfigurationException(
            f"Expected a compressed module to recover but {type(pl_module).__name__} has no low-rank layers. HINT: "
            "compress it first."
        )
    if (name := carries_adapters(pl_module)) is not None:
        raise MisconfigurationException(
            f"Expected a module without adapters but {name!r} carries some, which would be lost or merged "
            "with the recovery's. HINT: merge them first (`merge_and_unload()` of peft)."
        )
    _check_quantized(layers, recovery)
    if isinstance(recovery, LoraRecovery):
        config = recovery.lora_config()
        factor_names(pl_module, config.target_modules, config.exclude_modules)
    if recovery.distillation is not None:
        check_distillable(pl_module, recovery.distillation, list(layers))


def _check_quantized(layers: Mapping[str, CompressedLinear], recovery: Recovery) -> None:
    """Refuse layers that have nothing to train.

    Raises:
        MisconfigurationException: If adapters would have to be merged into rounded matrices, or if all matrices are in
            int8, which has one scale an output.
    """
    forms = {name: form for name, layer in layers.items() if (form := quantization_of(layer)) is not None}
    if not forms:
        return
    first = next(iter(forms))
    if len(forms) == len(layers) and all(isinstance(form, str) for form in forms.values()):
        raise MisconfigurationException(
            f"Expected layers that can be trained but {first!r} is in int8. HINT: recover first and quantise last, as "
            "FascCallback(rank=..., recovery=..., quantize='int8') does."
        )
    if isinstance(recovery, LoraRecovery):
        raise MisconfigurationException(
            f"Expected layers in floating point for adapters but {first!r} is rounded ({forms[first]}), and an adapter "
            "cannot be merged into a rounded matrix. HINT: recovery='factors' trains the scales; or recover first and "
            "round last, as FascCallback(rank=..., recovery=..., quantize='int8') does."
        )


def check_optimizers(trainer: pl.Trainer, trained: Mapping[str, nn.Parameter]) -> None:
    """Check that a fit's optimizers hold the trained parameters, and warn if some are missing or have 16 bits.

    Raises:
        MisconfigurationException: If no trained parameter is in an optimizer.
    """
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in trained.values()):
        rank_zero_warn(
            "The parameters that recovery trains are in 16 bits, in which small steps round to nothing. "
            "HINT: use LoraRecovery, whose adapters are float32, in a Trainer that does not convert the module "
            "(precision='bf16-mixed' does not); or recover in float32 and convert afterwards."
        )
    held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in trained.items() if id(p) not in held]
    if len(missing) == len(trained):
        raise MisconfigurationException(
            f"Expected optimizers over what recovery trains but none of the {len(trained)} parameters (for example "
            f"{missing[0]!r}) is in one. HINT: let `configure_optimizers` take "
            "`[p for p in self.parameters() if p.requires_grad]` whenever it is called."
        )
    if missing:
        rank_zero_warn(
            f"{len(missing)} of the {len(trained)} parameters that recovery trains are in no optimizer "
            f"(for example {missing[0]!r}) and will not change."
        )
