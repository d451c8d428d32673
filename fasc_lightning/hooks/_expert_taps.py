"""Hooks on the projections of fused experts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fasc_lightning._utils import Undo
from fasc_lightning.layers import ExpertLinear, Routing, routed


class ExpertTaps:
    """Runs fused modules expert by expert while their virtual layers have hooks; otherwise they run as before.

    Args:
        layers: Layers of any kind, by name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self._views: dict[int, tuple[Any, dict[tuple[int, str], ExpertLinear]]] = {}
        for layer in layers.values():
            if isinstance(layer, ExpertLinear):
                experts = layer.__dict__["experts"]
                _, views = self._views.setdefault(id(experts), (experts, {}))
                views[layer.expert, layer.projection] = layer

    def install(self, undo: Undo) -> None:
        """Send forwards through the virtual layers until it is undone; several observers may do so at once."""
        for experts, views in self._views.values():
            own = vars(experts)
            undo.add(_leave, own, views)
            if "_fasc_before" not in own:
                own["_fasc_before"] = own.get("forward")  # the instance's own forward, as accelerate sets one
            if not any(known is views for known in own.setdefault("_fasc_views", [])):
                own["_fasc_views"].append(views)
            # Bound, so that a copy of the module gets a forward of its own.
            own["forward"] = MethodType(_observed_forward, experts)


def _leave(own: dict[str, Any], views: Mapping[tuple[int, str], ExpertLinear]) -> None:
    """Restore a fused module's forward once it has no other observer: a monitor comes and goes during a calibration."""
    if "_fasc_before" not in own:  # it comes first and goes last
        return
    own["_fasc_views"] = [known for known in own.get("_fasc_views", []) if known is not views]
    if own["_fasc_views"]:
        return
    del own["_fasc_views"]
    if own["_fasc_before"] is None:
        own.pop("forward", None)
    else:
        own["forward"] = own["_fasc_before"]
    del own["_fasc_before"]


def _observed_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run the fused module's own loop over experts, operation by operation, with a place for hooks at each product."""
    if not torch.is_grad_enabled():
        before = vars(self)["_fasc_before"] or partial(type(self).forward, self)
        return before(hidden_states, top_k_index, top_k_weights)
    observers = vars(self)["_fasc_views"]

    def observe(projection: str, x: Tensor, y: Tensor) -> Tensor:
        found = [views[expert, projection] for views in observers if (expert, projection) in views]
        for view in {id(view): view for view in found}.values():  # observers may share their views
            y = view(x, y, routing)
        return y

    result = torch.zeros_like(hidden_states)
    for expert, places, tokens in routed(top_k_index, self.num_experts):
        routing = Routing(tokens, len(hidden_states))
        x = hidden_states[tokens]
        gate, up = nn.functional.linear(x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        inner = self.act_fn(observe("w_gate", x, gate)) * observe("w_up", x, up)
        y = observe("w_down", inner, nn.functional.linear(inner, self.down_proj[expert]))
        result.index_add_(0, tokens, (y * top_k_weights[tokens, places, None]).to(result.dtype))
    return result
