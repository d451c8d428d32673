"""Modules without their parameters: the author's class, and the state besides the parameters."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's class as its author wrote it, without the classes that parametrisation and FSDP2 add."""
    kind: Any = type_before_parametrizations(module)
    while kind.__bases__[0].__name__ == "FSDPModule":
        kind = kind.__bases__[1]
    return kind


def shell(module: nn.Module) -> nn.Module:
    """Return a module of the same class and state, without parameters, hooks and attributes that libraries have added.

    The state is shared, not copied.
    """
    bare: nn.Module = object.__new__(own_class(module))
    nn.Module.__init__(bare)
    own = vars(bare)
    # Left out: forwards of the instance and of accelerate, and tensors that hooks compute from parameters. Keys of a
    # subclass of str are FSDP2's.
    others = {"forward", "_hf_hook", "_old_forward", "weight", "bias"} | own.keys()
    own.update({name: value for name, value in vars(module).items() if type(name) is str and name not in others})
    own["training"] = module.training
    own["_buffers"] = dict(module._buffers)
    own["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    own["_modules"] = {name: child for name, child in module._modules.items() if name != "parametrizations"}
    own["_parameters"] = {"weight": None, "bias": None}
    return bare
