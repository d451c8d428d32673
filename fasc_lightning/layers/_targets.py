"""Selection of the layers to compress, and warnings about the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from lightning.fabric.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.parameter import is_lazy
from transformers.pytorch_utils import Conv1D

from fasc_lightning._utils import nearest_names, some_names
from fasc_lightning.layers._fused_experts import (
    ExpertLinear,
    expert_views,
    holds_experts,
    routers,
    warn_unknown_experts,
)
from fasc_lightning.layers._linear import linear_shape
from fasc_lightning.layers._probe import holds_dense_weight, is_plain_linear
from fasc_lightning.layers._reparametrised import warn_without_way_back


@dataclass(frozen=True)
class TargetedLayers:
    """The layers that a fit observes or compresses, with their shapes, looked up once.

    Attributes:
        modules: The layers by dotted name, in the model's order.
        shapes: (m, n) = (outputs, inputs) of each, under the same names.
    """

    modules: dict[str, nn.Module]
    shapes: dict[str, tuple[int, int]]

    @cached_property
    def token_shares(self) -> dict[str, float]:
        """Share of the tokens that each layer sees if a router spreads them evenly; 1 for layers outside of experts."""
        return {name: getattr(module, "expert_share", 1.0) for name, module in self.modules.items()}

    @classmethod
    def of(cls, modules: dict[str, nn.Module]) -> TargetedLayers:
        """Return the record of some layers."""
        return cls(modules, layer_shapes(modules))

    @property
    def weights(self) -> int:
        """Number of weights in all layers."""
        return sum(m * n for m, n in self.shapes.values())

    def share(self, names: Iterable[str]) -> TargetedLayers:
        """Return the record of some of these layers, in the given order of names."""
        names = list(names)
        return TargetedLayers({n: self.modules[n] for n in names}, {n: self.shapes[n] for n in names})


def target_layers(
    model: nn.Module,
    targets: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    *,
    compresses: bool = False,
) -> TargetedLayers:
    """Choose the layers of a fit or a plan, and warn of layers that cannot be, or should not be, compressed.

    Args:
        model: Any module; no weight is read.
        targets: As in :func:`select_layers`.
        exclude: As in :func:`select_layers`.
        compresses: Whether the layers will be replaced, not only observed or planned.

    Raises:
        ValueError: If nothing is selected, or if a layer has no weight yet.
    """
    layers = select_layers(model, targets, exclude)
    if targets in (None, "all-linear"):
        warn_unknown_experts(model)
        say_others(model)
    warn_other_layers(model, targets, exclude)
    if compresses:
        warn_tied_layers(model, layers)
        warn_without_way_back(layers)
    return TargetedLayers.of(layers)


def matches(name: str, patterns: str | Iterable[str]) -> bool:
    """Return whether patterns select a module name, by the rules of peft's ``target_modules``.

    Args:
        name: Dotted module name.
        patterns: A string is a regular expression for the whole name; a list holds names or their last parts.
    """
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def select_layers(
    model: nn.Module,
    targets: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
    eligible: Callable[[nn.Module], bool] | None = None,
) -> dict[str, nn.Module]:
    """Return the linear layers to compress, by dotted name, in the model's order.

    Args:
        model: Any module.
        targets: Patterns as in peft (see :func:`matches`). None or "all-linear" takes every ``nn.Linear`` and
            transformers ``Conv1D``, subclasses that compute the same map included, and every projection of fused
            experts (``layers/_fused_experts.py``). It leaves out output embeddings, routers and layers whose weight is
            tied to another module's; only a pattern that names them takes those.
        exclude: Patterns of layers to leave out.
        eligible: Tells whether a module can be selected; by default :func:`~fasc_lightning.layers.is_plain_linear`, and
            experts, but not the output projection of ``nn.MultiheadAttention``, which is read and never called.

    Raises:
        ValueError: If nothing is selected, if a pattern matches nothing, or if a layer has no weight yet.
    """
    check_initialised(model)
    if eligible is None:
        read = {id(attention.out_proj) for attention in _attentions(model).values()}

        def eligible(module: nn.Module) -> bool:
            return isinstance(module, ExpertLinear) or (id(module) not in read and is_plain_linear(module))

    linear: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if eligible(module):
            linear[name] = module
        elif holds_experts(name, module):
            linear |= {place: view for place, view in expert_views(name, module).items() if eligible(view)}
    wanted = _wanted(model, targets, exclude)
    layers = {name: module for name, module in linear.items() if wanted(name, module)}
    if not layers:
        known = ", ".join(list(linear)[:8]) or "none"
        others = other_layers(model, targets, exclude)
        raise ValueError(
            f"Expected `targets` to select linear layers but {targets=} with {exclude=} matches none of the "
            f"{len(linear)} in {type(model).__name__} (for example: {known}). A string is a regular expression for "
            f"the whole name, a list holds names or their last parts.{f' {_described(others)}' if others else ''}"
        )
    modules = [name for name, _ in model.named_modules() if name]
    for option, patterns in (("targets", None if targets == "all-linear" else targets), ("exclude", exclude)):
        kept = layers if option == "exclude" else linear.keys() - layers.keys()
        _check_patterns(option, patterns, modules, linear, kept)
    return layers


def _check_patterns(
    option: str,
    patterns: str | Iterable[str] | None,
    modules: Iterable[str],
    linear: Collection[str],
    missed: Iterable[str],
) -> None:
    """Refuse a pattern that has no effect: the user meant layers that it does not match.

    A pattern of a module without linear layers is no mistake, as "embed_tokens" in ``exclude``.

    Args:
        option: Name of the option.
        patterns: Its value.
        modules: Names of all modules.
        linear: Names of all layers that can be selected.
        missed: Names of the layers that the option does not affect.

    Raises:
        ValueError: If a pattern matches no module, or only modules around missed layers.
    """
    for pattern in [patterns] if isinstance(patterns, str) else list(patterns or ()):
        given = pattern if isinstance(patterns, str) else [pattern]
        if any(matches(name, given) for name in linear):
            continue
        found = [name for name in modules if matches(name, given)]
        around = [name for name in found if any(layer.startswith(f"{name}.") for layer in missed)]
        if found and not around:
            continue
        rule = "A string is a regular expression for the whole name, a list holds names or their last parts."
        if around:
            raise ValueError(
                f"Expected each pattern of `{option}` to match layers but {pattern!r} matches {some_names(around)} "
                f"and not the layers inside. {rule} HINT: r'.*\\b{re.escape(around[0].rpartition('.')[2])}\\..*' as a "
                "string matches the layers inside."
            )
        raise ValueError(
            f"Expected each pattern of `{option}` to match layers but {pattern!r} matches no module of the model. "
            f"Nearest: {', '.join(nearest_names(pattern, linear))}. {rule}"
        )


def _wanted(
    model: nn.Module, targets: str | list[str] | None, exclude: str | list[str] | None
) -> Callable[[str, nn.Module], bool]:
    """Return a function that tells whether the options ask for a linear layer, from its name and the layer."""
    everything = targets is None or targets == "all-linear"
    protected = _protected(model) if everything else set()

    def wanted(name: str, module: nn.Module) -> bool:
        if everything:
            selected = id(module) not in protected
        else:
            assert targets is not None
            selected = matches(name, targets)
        return selected and not (exclude is not None and matches(name, exclude))

    return wanted


def check_initialised(model: nn.Module) -> None:
    """Refuse lazy layers that have not seen an input: neither their shapes nor their sizes are known.

    Raises:
        ValueError: If there are such layers; the message names them and the remedy.
    """
    lazy = [
        name
        for name, module in model.named_modules()
        if any(is_lazy(value) for value in (*module._parameters.values(), *module._buffers.values()))
    ]
    if lazy:
        raise ValueError(
            f"Expected layers that have weights but {len(lazy)} lazy layer{' has' if len(lazy) == 1 else 's have'} "
            f"none yet: {some_names(lazy)}. HINT: run the model once on a batch before the fit, under torch.no_grad()."
        )


def _attentions(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """Return the attention modules of torch, whose forward reads the weight of ``out_proj`` and never calls it."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward
    }


def say_others(model: nn.Module) -> None:
    """Log in one line the modules with large weights that are no linear layers, and stay dense."""
    kinds: dict[str, tuple[Mapping[str, nn.Module], str]] = {
        "convolution": (_instances(model, nn.modules.conv._ConvNd), ""),
        "recurrent module": (_instances(model, nn.RNNBase, nn.RNNCellBase), ""),
        "bilinear layer": (_instances(model, nn.Bilinear), ""),
        "nn.MultiheadAttention module": (_attentions(model), ", whose projections are read and never called"),
    }
    total = sum(parameter.numel() for parameter in model.parameters())
    said = []
    for kind, (found, reason) in kinds.items():
        weights = {id(p): p.numel() for module in found.values() for p in module.parameters()}
        if weights:
            count = f"{len(found)} {kind}{'' if len(found) == 1 else 's'}"
            share = f"{sum(weights.values()) / total:.1%} of the parameters"
            said.append(f"{count} ({some_names(found)}; {share}){reason}")
    if said:
        rank_zero_info(
            f"FascCallback: only linear layers that are called are compressed. Dense stay {'; '.join(said)}."
        )


def _instances(model: nn.Module, *classes: type[nn.Module]) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, classes)}


def _protected(model: nn.Module) -> set[int]:
    """Return ids of the layers that "all-linear" leaves out: output embeddings, routers and tied weights."""
    protected = routers(model)
    owners: Counter[int] = Counter()
    for module in model.modules():
        get_output = getattr(module, "get_output_embeddings", None)
        if callable(get_output) and (output := get_output()) is not None:
            protected.add(id(output))
        owners.update(id(parameter) for parameter in module.parameters(recurse=False))
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and owners[id(module._parameters.get("weight"))] > 1:
            protected.add(id(module))
    return protected


def other_layers(
    model: nn.Module, targets: str | list[str] | None = None, exclude: str | list[str] | None = None
) -> dict[str, list[str]]:
    """Return the names of linear layers that the options ask for and that cannot be replaced, by class.

    They are subclasses of ``nn.Linear`` and ``Conv1D`` that compute something else, or that hide their computation.
    Without patterns, routers and layers of packed numbers (quantised by another library) are left out: no user expects
    them to be compressed.
    """
    everything = targets is None or targets == "all-linear"
    wanted = _wanted(model, targets, exclude)
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or not wanted(name, module) or is_plain_linear(module):
            continue
        kind = type(module).__name__
        routes = "router" in kind.lower() or "gating" in kind.lower()
        if everything and (routes or not holds_dense_weight(module) or module.weight.dtype.itemsize < 2):
            continue
        found.setdefault(kind, []).append(name)
    return found


def warn_other_layers(
    model: nn.Module, targets: str | list[str] | None = None, exclude: str | list[str] | None = None
) -> None:
    """Warn of linear layers that stay as they are because their forward is not known to be the plain one."""
    if found := other_layers(model, targets, exclude):
        rank_zero_warn(_described(found))


def _described(others: Mapping[str, list[str]]) -> str:
    count = sum(map(len, others.values()))
    listed = "; ".join(f"{kind}: {some_names(names)}" for kind, names in others.items())
    return (
        f"{count} linear layer{'s' if count > 1 else ''} of {'other classes' if len(others) > 1 else 'another class'} "
        f"than nn.Linear cannot be replaced, because a trial of the forward gave another result than x W^T + b, in "
        f"training or in eval mode ({listed}). HINT: let the class hold an nn.Linear and do the rest around it, so "
        "that the nn.Linear is compressed; or name the layers in `exclude`."
    )


def warn_tied_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Warn of selected layers that share their weight with another module, so that the model may grow.

    Args:
        model: The model.
        layers: The selected layers by name.
    """
    owners: dict[int, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), {})[name] = module
    selected = {id(layer) for layer in layers.values()}
    weights = {id(layer._parameters.get("weight")) for layer in layers.values()}
    for parameter in model.parameters():
        shared, numbers = owners.get(id(parameter), {}), parameter.numel()
        if len(shared) < 2 or id(parameter) not in weights:
            continue
        replaced = {name for name, module in shared.items() if id(module) in selected}
        kept = shared.keys() - replaced
        fate = f"{some_names(kept)} keep{'' if len(kept) > 1 else 's'} it" if kept else "each gets its own factors"
        rank_zero_warn(
            f"{some_names(shared)} share one weight of {numbers:,} numbers, which the model holds once. "
            f"{some_names(replaced)} {'is' if len(replaced) == 1 else 'are'} to be compressed and {fate}: the model "
            f"then holds up to {len(replaced) * numbers:,} numbers {'more' if kept else 'in its place'}. HINT: leave "
            f"{some_names(replaced)} out of `targets`."
        )


def layer_shapes(layers: dict[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Return (m, n) = (outputs, inputs) of each layer."""
    return {name: linear_shape(module) for name, module in layers.items()}
