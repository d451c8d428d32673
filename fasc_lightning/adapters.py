"""LoRA adapters on the factors of compressed layers: put on in place, trained, and merged into the factors."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fasc_lightning.lowrank import CompressedLinear
from fasc_lightning.swap import compressed_layers
from fasc_lightning.taps import matches

#: peft's own name of the only adapter.
ADAPTER = "default"


def factor_names(model: nn.Module, patterns: str | Iterable[str] | None = None) -> list[str]:
    """Return the dotted names of the linear layers that compressed layers are made of.

    Args:
        model: Any module.
        patterns: Of compressed layers, or of their factors, as in peft; None or "all-linear" takes all.

    Raises:
        ValueError: If none is left.
    """
    if patterns is not None and not isinstance(patterns, str):
        patterns = list(patterns)
    names = []
    for name, layer in compressed_layers(model).items():
        for child, factor in layer.named_children():
            whole = f"{name}.{child}"
            wanted = patterns in (None, "all-linear") or matches(name, patterns) or matches(whole, patterns)
            if isinstance(factor, nn.Linear) and wanted:
                names.append(whole)
    if not names:
        raise ValueError(
            f"Expected `target_modules` to select compressed layers but {patterns!r} matches none of "
            f"{', '.join(list(compressed_layers(model))[:3]) or 'those that there are, which is none'}."
        )
    return names


class Adapters:
    """LoRA adapters on some factors of a module, which stays of its own class and keeps its names.

    While they are on, ``state_dict()`` of the module is that of the merged model, so that whatever saves it (any
    checkpoint, with or without the state of callbacks) saves an ordinary compressed one.

    Args:
        module: Changed in place by :meth:`put_on`, and again by :meth:`take_off`.
        config: A peft ``LoraConfig``; its ``target_modules`` select.
        seed: Of the adapters' random start, the same on every process; other random numbers are not drawn.

    Attributes:
        factors: Names of the factors that carry adapters.
    """

    def __init__(self, module: nn.Module, config: Any, seed: int = 0) -> None:
        self.module = module
        self.factors = factor_names(module, config.target_modules)
        self._config = copy.deepcopy(config)
        self._config.target_modules = set(self.factors)
        self._seed = seed
        self._hook: RemovableHandle | None = None

    @property
    def on(self) -> bool:
        """Whether the adapters are on the module."""
        return self._hook is not None

    def put_on(self) -> None:
        """Put the adapters on, which add nothing as yet; nothing but them requires a gradient then."""
        from peft import inject_adapter_in_model
        from peft.functional import cast_adapter_dtype

        # Not yet any adapter: a failure half-way is undone by taking off what is there.
        self._hook = self.module.register_state_dict_post_hook(_as_merged)
        try:
            with torch.random.fork_rng(devices=_cuda_devices(self.module)):
                torch.manual_seed(self._seed)
                inject_adapter_in_model(self._config, self.module, ADAPTER)
            # 16-bit adapters would lose most of their updates to rounding.
            cast_adapter_dtype(self.module, ADAPTER)
        except BaseException:
            self.take_off(merge=False)
            raise

    def take_off(self, merge: bool) -> None:
        """Take the adapters off; safe at any time.

        Args:
            merge: Whether to add what they have learnt to the factors, whose rank stays. Without, factors are to the
                bit what they were.

        Raises:
            ValueError: If an adapter is not finite. The module is as it was, with its adapters.
        """
        found = dict(adapted_factors(self.module))
        merged = {name: _merged(layer) for name, layer in found.items()} if merge else {}
        for name, weight in merged.items():
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(f"Expected finite adapters but that of {name!r} is not. Take them off unmerged.")
        for name, layer in found.items():
            base = layer.get_base_layer()
            if merge:
                base.weight.data.copy_(merged[name])
            for parent, child in _places(self.module, layer):
                parent._modules[child] = base
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        for module in self.module.modules():
            vars(module).pop("peft_config", None)

    def bases(self) -> dict[str, Tensor]:
        """Return the factors under the adapters, by the names that their weights have without, not copied."""
        return {
            f"{name}.weight": layer.get_base_layer().weight.detach() for name, layer in adapted_factors(self.module)
        }


def adapted_factors(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the adapted children of compressed layers, with their names; of a shared layer one name, the first."""
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
    """As a hook of ``register_state_dict_post_hook``; a function of no one's, so that modules can be copied."""
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
    """Yield "a.b.", "a." of "a.b.c"."""
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


def put_values(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into a module's parameters by name.

    Raises:
        ValueError: If the module has no parameter of a name, or one of another shape. Nothing is changed.
    """
    parameters = dict(module.named_parameters())
    wrong = [name for name, value in values.items() if name not in parameters or parameters[name].shape != value.shape]
    if wrong:
        raise ValueError(
            f"Expected the parameters of {type(module).__name__} but {len(wrong)} are not there or of another shape, "
            f"{wrong[0]!r} for example. Is the checkpoint of a recovery with other options?"
        )
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
