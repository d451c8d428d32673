"""Linear layers whose weight is computed from other tensors: weight and spectral norms, orthogonal layers, pruning.

torch has two ways. Parametrisations replace the parameter by a property that is computed at every read. Older hooks set
the weight before every call of the layer. Reading the first kind can change its state (the spectral norm makes a step
of the power method in training mode). The second kind leaves behind the weight of the last call.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fasc_lightning._utils import some_names

#: Attribute of the replacement of such a layer that holds its :class:`DenseForm`.
DENSE_FORM = "dense_form"


def is_reparametrised(layer: nn.Module) -> bool:
    """Whether a layer's weight is computed from other tensors."""
    return layer._parameters.get("weight") is None and ("weight" in vars(layer) or _is_parametrised(layer))


def computed_weight(layer: Any) -> Tensor:
    """Return the weight of a reparametrised layer (:func:`is_reparametrised`), as in eval mode.

    It is computed from the layer's present tensors, and the read changes nothing.
    """
    if _is_parametrised(layer):
        modes = [(module, module.training) for module in layer.parametrizations.modules()]
        try:
            for module, _ in modes:
                module.training = False
            # Not by the property: `torch.nn.utils.parametrize.cached` would keep its values for the layer's own calls.
            weight: Tensor = layer.parametrizations.weight()
            return weight
        finally:
            for module, training in modes:
                module.training = training
    hook = _weight_hook(layer)
    if isinstance(hook, WeightNorm):
        return hook.compute_weight(layer)
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(layer, do_power_iteration=False)
    if isinstance(hook, BasePruningMethod):
        return hook.apply_mask(layer)
    return layer.weight


def trains_weight(layer: nn.Module) -> bool:
    """Whether a linear layer's weight, or a tensor that it is computed from, is trained."""
    weight = layer._parameters.get("weight")
    if weight is not None:
        return weight.requires_grad
    return any(
        p.requires_grad
        for name, p in layer.named_parameters()
        if not name.startswith(("bias", "parametrizations.bias"))
    )


class DenseForm:
    """The structure of a reparametrised layer without its numbers; a checkpoint's numbers make it a layer again.

    A pickled form is empty, because torch does not pickle parametrised modules.

    Args:
        layer: The layer; it is only read. None for an empty form.

    Raises:
        Exception: If a part of the layer cannot be copied; TypeError if its weight is computed in an unknown way.
    """

    def __init__(self, layer: nn.Module | None = None) -> None:
        self._twin = None if layer is None else _twin(layer)

    def __reduce__(self) -> tuple[Any, ...]:
        return DenseForm, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> DenseForm:
        return self  # it is never changed

    def fits(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a part of a state dict has the names of such a layer."""
        return self._twin is not None and self._twin.state_dict().keys() == state.keys()

    def filled(self, state: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> nn.Module:
        """Return a new layer of this form.

        Args:
            state: Its values; on the meta device they are not loaded.
            device: Device of the layer.
            dtype: Dtype of its floating-point numbers.

        Raises:
            RuntimeError: If the state does not fit the layer.
        """
        assert self._twin is not None
        layer = copy.deepcopy(self._twin)
        for module in layer.modules():
            for tensors in (module._parameters, module._buffers):
                for name, value in tensors.items():
                    if value is None or not value.is_meta:
                        continue
                    kind = dtype if value.is_floating_point() else value.dtype
                    new: Any = torch.zeros_like(value, device=device, dtype=kind)
                    tensors[name] = nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new
        if device.type != "meta":
            layer.load_state_dict(state)
            if "weight" in vars(layer):
                with torch.no_grad():
                    vars(layer)["weight"] = computed_weight(layer)
        return layer


def remember_form(old: nn.Module, new: nn.Module) -> None:
    """Store a layer's form on its replacement, if the layer has one."""
    if is_reparametrised(new):
        return
    if DENSE_FORM in vars(old):
        vars(new)[DENSE_FORM] = vars(old)[DENSE_FORM]
    elif is_reparametrised(old):
        try:
            vars(new)[DENSE_FORM] = DenseForm(old)
        except Exception:  # no form: `warn_without_way_back` has warned
            return


def warn_without_way_back(layers: Mapping[str, nn.Module]) -> None:
    """Warn of layers into which dense checkpoints can no longer be loaded after compression."""
    lost = [name for name, layer in layers.items() if is_reparametrised(layer) and not _can_come_back(layer)]
    if lost:
        rank_zero_warn(
            f"The weights of {len(lost)} layers ({some_names(lost)}) are computed from other tensors in a way that "
            "cannot be copied. They are compressed all the same, but dense checkpoints of this module will not load "
            "once they are. HINT: make them plain layers first (torch.nn.utils.parametrize.remove_parametrizations, "
            "torch.nn.utils.prune.remove), or leave them out with `exclude`."
        )


def _can_come_back(layer: nn.Module) -> bool:
    try:
        DenseForm(layer)
    except Exception:
        return False
    return True


def _is_parametrised(layer: nn.Module) -> bool:
    return "parametrizations" in layer._modules and parametrize.is_parametrized(layer, "weight")


def _weight_hook(layer: nn.Module) -> Any:
    """Return torch's hook that computes a layer's weight, the last one of several; None if there is none."""
    hooks: Iterable[Any] = reversed(layer._forward_pre_hooks.values())
    return next((hook for hook in hooks if _computed_name(hook) == "weight"), None)


def _computed_name(hook: Any) -> str | None:
    if isinstance(hook, WeightNorm | SpectralNorm):
        return hook.name
    return getattr(hook, "_tensor_name", None) if isinstance(hook, BasePruningMethod) else None


def _belongs(hook: Any) -> bool:
    """Whether a hook takes part in computing a weight. Other hooks may hold anything, for example the whole model."""
    hook = getattr(hook, "hook", hook)  # hooks of state dicts are wrapped
    return _computed_name(hook) is not None or str(getattr(hook, "__module__", "")).startswith("torch.nn.utils.")


def _twin(layer: nn.Module) -> nn.Module:
    """Return a copy of a reparametrised layer with its parameters and saved buffers on the meta device.

    Raises:
        TypeError: If it is unknown how the weight is computed.
    """
    if not _is_parametrised(layer) and _weight_hook(layer) is None:
        raise TypeError(f"Nothing says how the weight of {type(layer).__name__} is computed.")
    memo: dict[int, Any] = {}
    saved = layer.state_dict(keep_vars=True).values()  # other buffers are copied, since no checkpoint has them
    for tensor in (*layer.parameters(), *(value for value in saved if isinstance(value, Tensor))):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    for module in layer.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):  # a weight that a hook set is no leaf, and only leaves can be copied
                memo[id(value)] = torch.empty_like(value, device="meta", requires_grad=False)
            elif name.endswith("_hooks") and isinstance(value, dict):
                memo[id(value)] = type(value)((key, hook) for key, hook in value.items() if _belongs(hook))
    return copy.deepcopy(layer, memo)
