"""Experts as separate modules, which replace a fused module whose experts are compressed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from fasc_lightning.layers._fused_experts import (
    PROJECTIONS,
    active_share,
    expert_weight,
    holds_experts,
    is_fused_experts,
    routed,
    split_name,
)
from fasc_lightning.layers._guards import is_guard
from fasc_lightning.layers._linear import linear_shape


class UnfusedExperts(nn.Module):
    """Gated experts, each of linear layers of its own: ``3.w_gate``, ``3.w_up``, ``3.w_down``, dense or compressed.

    It has the forward of the module that it replaces, expert by expert: an expert computes
    ``w_down(act(w_gate(x)) * w_up(x))``, weighted by the router.

    Args:
        fused: The module to replace, on any device.
        layers: Existing layers, by (expert, projection). The others are copied from ``fused``; on the meta device they
            are empty layers.
    """

    def __init__(self, fused: Any, layers: Mapping[tuple[int, str], nn.Module] | None = None) -> None:
        super().__init__()
        self.num_experts: int = fused.num_experts
        self.act_fn = fused.act_fn
        self.config = getattr(fused, "config", None)
        self.fused_class = type(fused)
        layers = layers or {}
        for expert in range(self.num_experts):
            parts = {p: layers.get((expert, p)) or _dense(fused, expert, p) for p in PROJECTIONS}
            self.add_module(str(expert), nn.ModuleDict(parts))
        for part in (self.layer(e, p) for e in range(self.num_experts) for p in PROJECTIONS):
            vars(part)["expert_share"] = active_share(fused)  # for counts of FLOPs; swaps hand it on
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the experts' weighted sum.

        Args:
            hidden_states: Shape (tokens, H).
            top_k_index: Experts of each token, shape (tokens, k).
            top_k_weights: Their weights, shape (tokens, k).
        """
        result = torch.zeros_like(hidden_states)
        idle = set(range(self.num_experts)) if torch.is_grad_enabled() else set()
        for expert, places, tokens in routed(top_k_index, self.num_experts):
            self._add(result, expert, hidden_states, places, tokens, top_k_weights)
            idle.discard(expert)
        # Trained experts without tokens run on an empty batch. Their gradients are then zeros, as in a fused module.
        # With no gradient at all, processes of DDP would wait for them forever.
        none = top_k_index.new_empty(0)
        for expert in idle:
            if any(p.requires_grad for p in self.get_submodule(str(expert)).parameters()):
                self._add(result, expert, hidden_states, none, none, top_k_weights)
        return result

    def _add(
        self, result: Tensor, expert: int, inputs: Tensor, places: Tensor, tokens: Tensor, top_k_weights: Tensor
    ) -> None:
        parts: Any = self._modules[str(expert)]
        x = inputs[tokens]
        y = parts["w_down"](self.act_fn(parts["w_gate"](x)) * parts["w_up"](x))
        result.index_add_(0, tokens, (y * top_k_weights[tokens, places, None]).to(result.dtype))

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # A state dict read from a saved file has one more entry than the module.
        for key in [key for key, value in state_dict.items() if key.startswith(prefix) and is_guard(value)]:
            del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def layer(self, expert: int, projection: str) -> nn.Module:
        """Return one projection of one expert."""
        return self.get_submodule(f"{expert}.{projection}")

    def fuse(self) -> nn.Module:
        """Return a fused module of the same function.

        Raises:
            ValueError: If a layer is not a dense linear one.
        """
        weights: dict[tuple[int, str], nn.Linear] = {}
        for expert in range(self.num_experts):
            for projection in PROJECTIONS:
                layer = self.layer(expert, projection)
                if type(layer) is not nn.Linear:
                    raise ValueError(
                        f"Expected dense layers to fuse but {expert}.{projection} is a {type(layer).__name__}. Make "
                        "the model dense first: swap_to_dense(model)."
                    )
                weights[expert, projection] = layer
        fused: Any = self.empty()
        count, trained = range(self.num_experts), any(p.requires_grad for p in self.parameters())
        with torch.no_grad():
            pairs = [torch.cat([weights[e, "w_gate"].weight, weights[e, "w_up"].weight]) for e in count]
            fused.gate_up_proj = nn.Parameter(torch.stack(pairs), trained)
            fused.down_proj = nn.Parameter(torch.stack([weights[e, "w_down"].weight for e in count]), trained)
        return fused

    def empty(self) -> nn.Module:
        """Return a fused module of the same shapes on the meta device."""
        with torch.device("meta"):
            fused: Any = self.fused_class(self.config)
        fused.act_fn = self.act_fn
        gate, down = self.layer(0, "w_gate"), self.layer(0, "w_down")
        kind: Any = down.weight
        for name, (m, n) in (("gate_up_proj", linear_shape(gate)), ("down_proj", linear_shape(down))):
            # With these sizes, since the class may have been made with other sizes than the configuration's.
            rows = 2 * m if name == "gate_up_proj" else m
            weight = torch.empty(self.num_experts, rows, n, device="meta", dtype=kind.dtype)
            setattr(fused, name, nn.Parameter(weight))
        return fused.train(self.training)


def _dense(fused: nn.Module, expert: int, projection: str) -> nn.Linear:
    weight = expert_weight(fused, expert, projection)
    m, n = weight.shape
    linear = nn.Linear(n, m, bias=False, device="meta", dtype=weight.dtype)
    if not weight.is_meta:
        # A copy: a slice would keep the memory of the whole tensor.
        linear.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    return linear


def with_experts(model: nn.Module, replacements: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return replacements in which virtual layers are joined to modules that the model has.

    Args:
        model: The model.
        replacements: New modules by name; names of virtual layers are allowed (``...experts.3.w_gate``).

    Returns:
        The replacements, with one :class:`UnfusedExperts` for each fused module in place of its virtual layers.

    Raises:
        ValueError: If an expert's layer would change its shape, or there is no such expert.
    """
    result: dict[str, nn.Module] = {}
    parts: dict[str, dict[tuple[int, str], nn.Module]] = {}
    for name, new in replacements.items():
        found = _fused_at(model, name)
        if found is None:
            result[name] = new
            continue
        fused, expert, projection = found
        _check_part(name, new, fused, expert, projection)
        place = name.removesuffix(f".{expert}.{projection}")
        parts.setdefault(place, {})[expert, projection] = new
    for place, layers in parts.items():
        fused = model.get_submodule(place)
        kind = expert_weight(fused, 0, "w_down")
        for new in layers.values():
            if not kind.is_meta:
                new.to(device=kind.device, dtype=kind.dtype)
        result[place] = UnfusedExperts(fused, layers)
    return result


def unfuse(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """Replace fused modules in place by separate dense layers with the same weights.

    Args:
        model: The model.
        names: Names of layers; names other than virtual layers of fused modules are skipped.

    Returns:
        The fused modules by name.
    """
    places = {name.rsplit(".", 2)[0] for name in names if _fused_at(model, name) is not None}
    old = {place: model.get_submodule(place) for place in sorted(places)}
    for place, fused in old.items():
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, UnfusedExperts(fused))
    return old


def expert_layers(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names that belong to experts of a model, fused or as separate modules."""
    places = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, UnfusedExperts) or holds_experts(name, module)
    }
    return [name for name in names if (parts := split_name(name)) is not None and parts[0] in places]


def fuse_dense(model: nn.Module) -> None:
    """Fuse experts again, in place, if all their layers are dense."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, UnfusedExperts) and all(
                type(child.get_submodule(p)) is nn.Linear for p in _paths(child)
            ):
                setattr(parent, name, child.fuse())


def _paths(experts: UnfusedExperts) -> list[str]:
    return [f"{expert}.{projection}" for expert in range(experts.num_experts) for projection in PROJECTIONS]


def _fused_at(model: nn.Module, name: str) -> tuple[Any, int, str] | None:
    """Return (fused module, expert, projection) for the name of a virtual layer; None for any other name."""
    parts = split_name(name)
    if parts is None:
        return None
    try:
        fused = model.get_submodule(parts[0])
    except AttributeError:
        return None
    if not is_fused_experts(fused) or parts[1] >= fused.num_experts:  # type: ignore[operator]
        return None
    return fused, parts[1], parts[2]


def _check_part(name: str, new: nn.Module, fused: nn.Module, expert: int, projection: str) -> None:
    m, n = expert_weight(fused, expert, projection).shape
    if linear_shape(new) != (m, n):
        raise ValueError(f"Expected a replacement of shape ({m}, {n}) for {name!r}, got {linear_shape(new)}.")
