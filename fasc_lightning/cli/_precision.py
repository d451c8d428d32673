"""The precision of a calibration, by the device."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import nn

from fasc_lightning.options import Precision

#: Value of a recipe's option ``--precision``, beside a Trainer's precisions.
AUTO = "auto"


def calibration_precision(word: str, model: nn.Module) -> Precision | None:
    """Return the precision that a recipe's ``--precision`` stands for.

    Args:
        word: "auto", or one of :data:`~fasc_lightning.options.Precision`. "auto" is bf16-mixed for a float32 model on a
            device that multiplies bfloat16 faster than float32, otherwise the model's own type.
        model: The model, on its device.

    Raises:
        ValueError: If the word is unknown.
    """
    if word == AUTO:
        weight = next(model.parameters())
        return "bf16-mixed" if weight.dtype == torch.float32 and multiplies_bfloat16(weight.device) else None
    for precision in get_args(Precision):
        if word == precision:
            return precision
    raise ValueError(f"Expected --precision to be {AUTO}, {', '.join(get_args(Precision))} but got {word!r}.")


def multiplies_bfloat16(device: torch.device) -> bool:
    """Tell whether a device has instructions for products of bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of torch 2.9 and later
    return device.type == "cpu" and any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
