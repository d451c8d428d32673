"""Fused experts as virtual linear layers, one for each projection of an expert, with hooks, shapes and weights.

Current transformers hold the experts of a block in two tensors, ``gate_up_proj`` (E, 2 I, H) and ``down_proj``
(E, H, I). They run them as grouped products, which leave no place for hooks. Here each projection of each expert has a
name, ``...experts.3.w_gate``, and a module for it. The module's weight is a slice of the tensor, and it has no
parameters of its own. So all code for named linear layers works on experts. The names differ from the names in
checkpoints (``experts.3.gate_proj``), which transformers would fuse when it reads them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

#: The projections of an expert, in the order of its computation.
PROJECTIONS = ("w_gate", "w_up", "w_down")

# The name must contain "expert", so that blocks of a model, as layers.3.w_up, are not taken for experts.
_NAME = re.compile(rf"(?P<experts>(?:.+\.)?[^.]*expert[^.]*)\.(?P<expert>\d+)\.(?P<projection>{'|'.join(PROJECTIONS)})")


@dataclass(frozen=True)
class Routing:
    """The tokens behind the rows of an expert's activations.

    Attributes:
        tokens: Position of each row's token among all tokens of the block, shape (rows,), each at most once.
        total: Count of all tokens of the block.
    """

    tokens: Tensor
    total: int


class ExpertLinear(nn.Linear):
    """One projection of one expert of a fused module, as a linear layer without parameters of its own.

    It is no child of any module. Its forward is a place for hooks: it returns the fused module's result, the same to
    the last bit.

    Args:
        experts: The fused module.
        expert: Number of the expert.
        projection: One of :data:`PROJECTIONS`.
    """

    expert: int
    projection: str

    def __init__(self, experts: nn.Module, expert: int, projection: str) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would make a weight
        self.register_parameter("bias", None)
        m, n = expert_shape(experts, projection)
        # Set without nn.Module's search for parameters, which takes seconds for tens of thousands of experts. The
        # fused module must not become a child: its parameters are the model's.
        vars(self).update(experts=experts, expert=expert, projection=projection, out_features=m, in_features=n)
        self.training = experts.training

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The slice of the fused tensor, a view, shape (m, n)."""
        return expert_weight(self.__dict__["experts"], self.expert, self.projection)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight, read without a slice."""
        experts: Any = self.__dict__["experts"]
        return (experts.down_proj if self.projection == "w_down" else experts.gate_up_proj).dtype

    @property
    def expert_share(self) -> float:
        """Share of the tokens that an expert sees if all see equally many: experts for a token over all experts."""
        return active_share(self.__dict__["experts"])

    def named_parameters(self, prefix: str = "", *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the slice, so that sizes, dtypes and devices are found as for any layer."""
        weight: Any = self.weight
        yield f"{prefix}{'.' if prefix else ''}weight", weight

    def forward(self, x: Tensor, y: Tensor, routing: Routing) -> Tensor:  # type: ignore[override]
        """Return ``y``, which the fused module computed from the rows ``x``."""
        return y


def expert_weight(experts: Any, expert: int, projection: str) -> Tensor:
    """Return the weight of one projection of one expert, a view of the fused tensor, shape (m, n)."""
    with torch.enable_grad():  # a view made without gradients would not require any
        if projection == "w_down":
            return experts.down_proj[expert]
        width = experts.gate_up_proj.shape[1] // 2
        start = 0 if projection == "w_gate" else width
        return experts.gate_up_proj[expert, start : start + width]


def expert_shape(experts: Any, projection: str) -> tuple[int, int]:
    """Return (m, n) of a projection, the same for all experts; it makes no slice, since a plan asks for thousands."""
    hidden, width = experts.down_proj.shape[1:]
    return (hidden, width) if projection == "w_down" else (width, hidden)


def active_share(experts: Any) -> float:
    """Return the share of a block's experts that works on a token; 1 if the configuration does not give it."""
    active = getattr(getattr(experts, "config", None), "num_experts_per_tok", None)
    return active / experts.num_experts if isinstance(active, int) else 1.0


def is_fused_experts(module: Any) -> bool:
    """Tell whether a module holds gated experts of a supported kind, as in Mixtral and Qwen.

    transformers' decorator of experts modules declares their computation. Other kinds (transposed, interleaved or
    biased weights, another gate, a norm, experts spread over devices) are not supported.
    """
    stated = {
        "has_gate": True,
        "has_bias": False,
        "has_post_expert_norm": False,
        "is_transposed": False,
        "is_concatenated": True,
        "_is_expert_parallel": False,
    }
    if not hasattr(type(module).forward, "__wrapped__") or not callable(getattr(module, "act_fn", None)):
        return False
    if any(getattr(module, name, None) is not value for name, value in stated.items()):
        return False
    from transformers.integrations import moe  # imported late: only modules of transformers come this far

    if getattr(type(module), "_apply_gate", None) is not moe._default_apply_gate:
        return False
    own: dict[str, nn.Parameter] = dict(module.named_parameters())
    if set(own) != {"gate_up_proj", "down_proj"} or any(p.ndim != 3 for p in own.values()):
        return False
    (E, twice, H), down = own["gate_up_proj"].shape, own["down_proj"].shape
    floating = all(p.is_floating_point() for p in own.values())
    shaped = twice % 2 == 0 and tuple(down) == (E, H, twice // 2)
    return bool(floating and shaped and module.num_experts == E)


def holds_experts(name: str, module: nn.Module) -> bool:
    """Tell whether a module holds fused experts that are seen as layers, and has a name with "expert" in it.

    All of transformers' modules have such a name. Under another name, the layers' names would be ambiguous.
    """
    return split_name(f"{name}.0.{PROJECTIONS[0]}") is not None and is_fused_experts(module)


def expert_views(name: str, experts: nn.Module) -> dict[str, ExpertLinear]:
    """Return the virtual layers of a fused module.

    Args:
        name: Dotted name of the module.
        experts: The module (:func:`is_fused_experts`).
    """
    count: Any = experts.num_experts
    return {
        f"{name}.{expert}.{projection}": ExpertLinear(experts, expert, projection)
        for expert in range(count)
        for projection in PROJECTIONS
    }


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return all modules of a model under all their names, and the virtual layers of fused experts under theirs."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in list(modules.items()):
        if holds_experts(name, module):
            modules |= expert_views(name, module)
    return modules


def split_name(name: str) -> tuple[str, int, str] | None:
    """Return (name of the experts module, expert, projection) of a virtual layer's name; None for other names."""
    found = _NAME.fullmatch(name)
    return None if found is None else (found["experts"], int(found["expert"]), found["projection"])


def routers(model: nn.Module) -> set[int]:
    """Return ids of the linear layers that route tokens to experts, or weigh an expert that all tokens share.

    They are neighbours of an experts module, fused or unfused. A router, known by its name or class ("...router",
    "gate", "...Gating"), gives all its linear layers. Without a router, linear layers with one output for each expert
    count. Linear layers with a single output always count. Projections of a shared expert never count, however wide
    they are.
    """
    found: set[int] = set()
    for parent in model.modules():
        children = list(parent.named_children())
        for experts in [child for _, child in children if is_fused_experts(child) or hasattr(child, "fused_class")]:
            own = [child for name, child in children if child is not experts and _is_router(name, child)]
            found |= {id(part) for router in own for part in router.modules() if isinstance(part, nn.Linear)}
            widths: set[Any] = {1} if own else {1, experts.num_experts}
            found |= {id(c) for _, c in children if isinstance(c, nn.Linear) and c.out_features in widths}
    return found


def _is_router(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return not isinstance(module, nn.Linear) and ("router" in f"{name} {kind}" or name == "gate" or "gating" in kind)


def unknown_experts(model: nn.Module) -> list[str]:
    """Return the names of modules that hold experts in three-dimensional weights of an unsupported kind."""
    return [
        name
        for name, module in model.named_modules()
        if "expert" in f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        and any(p.ndim == 3 for p in module.parameters(recurse=False))
        and not holds_experts(name, module)
    ]


def warn_unknown_experts(model: nn.Module) -> None:
    """Warn of experts that stay dense because their kind is not supported."""
    if names := unknown_experts(model):
        kind = type(model.get_submodule(names[0])).__name__
        rank_zero_warn(
            f"{len(names)} modules hold experts of a kind that is not known here ({kind}, for example {names[0]!r}) "
            "and stay dense: known are gated experts without biases whose weights are (experts, outputs, inputs), as "
            "in Mixtral and Qwen. Budget and ranks are those of the other layers."
        )


def routed(top_k_index: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (expert, places among the k, tokens) of each expert with tokens, in the order of transformers' own loop.

    Args:
        top_k_index: Experts of each token, shape (tokens, k); the number of experts itself stands for none.
        experts: Number of experts.
    """
    with torch.no_grad():
        chosen = top_k_index.T.flatten()
        # One sort and one wait for the device; masks would need one wait for each expert.
        order = chosen.argsort(stable=True)
        places, tokens = order // max(1, len(top_k_index)), order % max(1, len(top_k_index))
        counts = chosen.bincount(minlength=experts).tolist()
    start = 0
    for expert, count in enumerate(counts[:experts]):
        if count:
            yield expert, places[start : start + count], tokens[start : start + count]
        start += count


def expert_groups(layers: Mapping[str, nn.Module] | Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """Return the names of virtual layers by (experts module, projection)."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in layers:
        if (parts := split_name(name)) is not None:
            groups.setdefault((parts[0], parts[2]), []).append(name)
    return groups
