"""LoRA adapters on the factors of compressed layers: added in place, trained, and merged into the factors."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from fasc_lightning._utils import Undo, undoing
from fasc_lightning.layers import CompressedLinear, compressed_layers, matches

#: The name of the adapter; peft's default.
ADAPTER = "default"


def factor_names(
    model: nn.Module, patterns: str | Iterable[str] | None = None, exclude: str | Iterable[str] | None = None
) -> list[str]:
    """Return the dotted names of the factors of compressed layers, each a linear layer.

    Args:
        model: Any module.
        patterns: Patterns of compressed layers or of their factors, as in peft; None or "all-linear" takes all.
        exclude: Patterns of layers or factors to leave out.

    Raises:
        ValueError: If no factor is left.
    """
    wanted, unwanted = _listed(patterns), _listed(exclude) or []

    def selects(patterns: str | list[str], *names: str) -> bool:
        return any(matches(name, patterns) for name in names)

    names = []
    for name, layer in compressed_layers(model).items():
        for child, factor in layer.named_children():
            whole = f"{name}.{child}"
            taken = wanted is None or wanted == "all-linear" or selects(wanted, name, whole)
            if isinstance(factor, nn.Linear) and taken and not selects(unwanted, name, whole):
                names.append(whole)
    if not names:
        but = f" without {unwanted!r}" if unwanted else ""
        raise ValueError(
            f"Expected `target_modules` to select compressed layers but {wanted!r}{but} matches none of "
            f"{', '.join(list(compressed_layers(model))[:3]) or 'the compressed layers: the module has none'}."
        )
    return names


def _listed(patterns: str | Iterable[str] | None) -> str | list[str] | None:
    return patterns if patterns is None or isinstance(patterns, str) else sorted(patterns)


def by_factor(patterns: Mapping[str, Any] | None, factors: Iterable[str], option: str) -> dict[str, Any]:
    """Return the values of ``rank_pattern`` or ``alpha_pattern`` by patterns that each match one factor.

    peft compares patterns with the names of factors alone and would silently ignore a layer's name.

    Args:
        patterns: Values by regular expressions for the end of a layer's or a factor's name; the first match counts.
        factors: Names of the factors that carry adapters.
        option: Name of the option, for the warning about patterns without a match.
    """
    found, used = {}, set()
    for factor in factors:
        names = (factor.rpartition(".")[0], factor)
        for pattern, value in (patterns or {}).items():
            if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
                found[f"^{re.escape(factor)}"] = value
                used.add(pattern)
                break
    if unused := [pattern for pattern in patterns or {} if pattern not in used]:
        rank_zero_warn(f"{unused} of `{option}` name no compressed layer that carries an adapter.")
    return found


class Adapters:
    """LoRA adapters on some factors of a module. The module keeps its class and its names.

    While the adapters are on, ``state_dict()`` of the module is the state of the merged model. Every checkpoint, with
    or without the state of callbacks, is thus one of an ordinary compressed model.

    Args:
        module: Module that :meth:`put_on` and :meth:`take_off` change in place.
        config: A peft ``LoraConfig``, whose patterns may name layers or factors.
        seed: Seed of the adapters' random start, the same on every process. The global generators do not advance.

    Attributes:
        factors: Names of the factors that carry adapters.
    """

    def __init__(self, module: nn.Module, config: Any, seed: int = 0) -> None:
        self.module = module
        self.factors = factor_names(module, config.target_modules, config.exclude_modules)
        self._config = copy.deepcopy(config)
        self._config.target_modules, self._config.exclude_modules = set(self.factors), None
        for option in ("rank_pattern", "alpha_pattern"):
            setattr(self._config, option, by_factor(getattr(config, option), self.factors, option))
        self._seed = seed
        #: Whether the adapters are on the module.
        self.on = False
        self._undo = Undo()

    def put_on(self) -> None:
        """Put the adapters on; they start at zero, and only they require gradients."""
        from peft import inject_adapter_in_model
        from peft.functional import cast_adapter_dtype

        with undoing() as undo:
            undo.add(self._undo.close)
            self._undo.set(self, "on", True)
            self._undo.hook(self.module.register_state_dict_post_hook, _as_merged)
            self._undo.add(_take_off, self.module)
            with torch.random.fork_rng(devices=_cuda_devices(self.module)):
                torch.manual_seed(self._seed)
                inject_adapter_in_model(self._config, self.module, ADAPTER)
            # 16-bit adapters would lose most of their updates to rounding.
            cast_adapter_dtype(self.module, ADAPTER)
            self.factors = [name for name, _ in adapted_factors(self.module)]  # `layers_to_transform` selects, too
            undo.forget()

    @contextmanager
    def as_kept(self) -> Iterator[None]:
        """Make the module compute as with merged adapters inside the context.

        Merging 32-bit adapters into 16-bit factors loses digits, so that the merged module is another function.
        """
        found = {n: layer for n, layer in adapted_factors(self.module) if layer.get_base_layer().weight.itemsize < 4}
        with undoing() as undo:
            for layer in found.values():
                base = layer.get_base_layer()
                _put(undo, base.weight.data, _merged(layer))
                for parent, child in _places(self.module, layer):
                    undo.add(parent._modules.__setitem__, child, layer)
                    parent._modules[child] = base
            yield

    def take_off(self, merge: bool) -> None:
        """Take the adapters off; safe at any time.

        Args:
            merge: Whether to merge the adapters into the factors, whose rank stays. Otherwise the factors are bitwise
                the former ones.

        Raises:
            ValueError: If an adapter is not finite. The module then keeps its adapters.
        """
        found = dict(adapted_factors(self.module))
        merged = {name: _merged(layer) for name, layer in found.items()} if merge else {}
        for name, weight in merged.items():
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(f"Expected finite adapters but that of {name!r} is not. Take them off unmerged.")
        with undoing() as undo:
            for name, weight in merged.items():
                _put(undo, found[name].get_base_layer().weight.data, weight)
            self._undo.close()
            undo.forget()

    def bases(self) -> dict[str, Tensor]:
        """Return the factors' weights under the adapters, not copied, by their names without adapters."""
        return {
            f"{name}.weight": layer.get_base_layer().weight.detach() for name, layer in adapted_factors(self.module)
        }


def _put(undo: Undo, tensor: Tensor, values: Tensor) -> None:
    undo.add(tensor.copy_, tensor.clone())
    tensor.copy_(values)


def _take_off(module: nn.Module) -> None:
    for layer in dict(adapted_factors(module)).values():
        for parent, child in _places(module, layer):
            parent._modules[child] = layer.get_base_layer()
    for part in module.modules():
        vars(part).pop("peft_config", None)


def adapted_factors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the adapted factors of compressed layers with their names; a shared layer has its first name only."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in module.named_modules():
        if isinstance(layer, CompressedLinear):
            for child, factor in layer.named_children():
                if isinstance(factor, BaseTunerLayer):
                    yield f"{name}.{child}", factor


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """Return a factor's weight with its adapter merged; a copy, since peft merges in place."""
    if layer.merged:
        return layer.get_base_layer().weight.detach()
    twin = copy.deepcopy(layer)
    twin.merge()
    return twin.get_base_layer().weight.detach()


def _as_merged(module: nn.Module, state_dict: Any, prefix: str, *unused: Any) -> None:
    """Merge adapters in a state dict, as a state dict hook; a module-level function, so that modules can be copied."""
    del unused
    adapted = {id(layer): layer for _, layer in adapted_factors(module)}
    names = {
        f"{prefix}{name}.": adapted[id(layer)]
        for name, layer in module.named_modules(remove_duplicate=False)
        if id(layer) in adapted
    }
    entries = list(state_dict.items())
    state_dict.clear()
    for key, value in entries:
        owner = next((name for name in _parents(key) if name in names), None)
        if owner is None:
            state_dict[key] = value
        elif key == f"{owner}base_layer.weight":
            state_dict[f"{owner}weight"] = _merged(names[owner])
        elif key.startswith(f"{owner}base_layer."):
            state_dict[owner + key.removeprefix(f"{owner}base_layer.")] = value


def _parents(key: str) -> Iterator[str]:
    """Yield the prefixes of a key, as "a.b." and "a." for "a.b.c"."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield f"{key}."


def _places(module: nn.Module, child: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(parent, name) for parent in module.modules() for name, found in parent._modules.items() if found is child]


def _cuda_devices(module: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})


def carries_adapters(module: nn.Module) -> str | None:
    """Return the name of a layer that carries adapters, or None."""
    for name, layer in module.named_modules():
        if hasattr(layer, "lora_A") or hasattr(layer, "base_layer"):
            return name
    return None


@torch.no_grad()
def put_values(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into a module's parameters by name.

    Raises:
        ValueError: If the module lacks a parameter or has one of another shape. Nothing is changed then.
    """
    parameters = dict(module.named_parameters())
    wrong = [name for name, value in values.items() if name not in parameters or parameters[name].shape != value.shape]
    if wrong:
        raise ValueError(
            f"Expected the parameters of {type(module).__name__} but {len(wrong)} are not there or of another shape, "
            f"{wrong[0]!r} for example. Is the checkpoint of a recovery with other options?"
        )
    for name, value in values.items():
        parameters[name].copy_(value)
