"""A module without its parameters: its class as its author wrote it, and the state beside them."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations


def own_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module as its author wrote it, without what parametrisation and FSDP2 put before it."""
    kind: Any = type_before_parametrizations(module)
    while kind.__bases__[0].__name__ == "FSDPModule":
        kind = kind.__bases__[1]
    return kind


def shell(module: nn.Module) -> nn.Module:
    """Return a module of the same class and state without parameters, hooks, and what others have put on it.

    The state is shared, not copied.
    """
    bare: nn.Module = object.__new__(own_class(module))
    nn.Module.__init__(bare)
    own = vars(bare)
    # The forward of an instance and accelerate's, and what hooks compute from parameters; keys that are more than
    # strings are FSDP2's.
    others = {"forward", "_hf_hook", "_old_forward", "weight", "bias"} | own.keys()
    own.update({name: value for name, value in vars(module).items() if type(name) is str and name not in others})
    own["training"] = module.training
    own["_buffers"] = dict(module._buffers)
    own["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    own["_modules"] = {name: child for name, child in module._modules.items() if name != "parametrizations"}
    own["_parameters"] = {"weight": None, "bias": None}
    return bare
