"""Coupled rows and columns of a block's layers: a unit of them is pruned whole or not at all.

Torch-Pruning (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning") traces the MLPs and cuts the layers. Its
tracing of attention loses indices where grouped keys and values are repeated, so this module lists the few existing
layouts of attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fasc_lightning._utils import evaluating, undoing
from fasc_lightning.layers import linear_shape

#: Names in model families of the projection that writes the heads to the residual stream.
_OUTPUTS = ("o_proj", "out_proj", "dense")


class Conv1DPruner(tp.BasePruningFunc):
    """Cuts transformers' Conv1D, which Torch-Pruning does not support: y = x W + b with W of shape (n, m)."""

    TARGET_MODULES = Conv1D

    def prune_out_channels(self, layer: Conv1D, idxs: Sequence[int]) -> Conv1D:
        """Remove outputs."""
        keep = sorted(set(range(layer.nf)) - set(idxs))
        layer.nf = len(keep)
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 1)
        layer.bias = self._prune_parameter_and_grad(layer.bias, keep, 0)
        return layer

    def prune_in_channels(self, layer: Conv1D, idxs: Sequence[int]) -> Conv1D:
        """Remove inputs."""
        keep = sorted(set(range(layer.nx)) - set(idxs))
        layer.nx = len(keep)
        layer.weight = self._prune_parameter_and_grad(layer.weight, keep, 0)
        return layer

    def get_out_channels(self, layer: Conv1D) -> int:
        """Return m."""
        return layer.nf

    def get_in_channels(self, layer: Conv1D) -> int:
        """Return n."""
        return layer.nx


@dataclass(frozen=True)
class Member:
    """One side of one layer in a group.

    Attributes:
        name: Dotted name of the layer.
        layer: ``nn.Linear`` or ``Conv1D``.
        side: "out" for rows of W (m, n), "in" for columns.
        index: Rows or columns of each unit, shape (units, rows or columns of one unit).
    """

    name: str
    layer: nn.Module
    side: Literal["in", "out"]
    index: Tensor

    @property
    def unit_cost(self) -> int:
        """Number of this layer's weights in one unit."""
        m, n = linear_shape(self.layer)
        return self.index.shape[1] * (n if self.side == "out" else m)

    def cut(self, units: Tensor) -> None:
        """Remove units from the layer, in place."""
        pruner = Conv1DPruner() if isinstance(self.layer, Conv1D) else tp.pruner.function.LinearPruner()
        trains = {name: parameter.requires_grad for name, parameter in self.layer.named_parameters()}
        pruner(self.layer, self.index[units].flatten().tolist(), to_output=self.side == "out")
        for name, parameter in self.layer.named_parameters():
            parameter.requires_grad_(trains[name])


@dataclass(frozen=True)
class CoupledGroup:
    """Layers whose units are pruned together.

    Attributes:
        kind: "heads" (a unit is a key-value head with its query heads) or "channels" (an intermediate channel).
        block: Index of the block.
        owner: The module that holds the layers and attributes with their sizes.
        members: The layers' sides.
    """

    kind: Literal["heads", "channels"]
    block: int
    owner: nn.Module
    members: tuple[Member, ...]

    @property
    def units(self) -> int:
        """Number of units."""
        return len(self.members[0].index)

    @property
    def unit_cost(self) -> int:
        """Number of weights in one unit. Each side of a group belongs to another layer, so costs add up."""
        return sum(member.unit_cost for member in self.members)


def attention_group(block: int, name: str, attention: nn.Module, linear: dict[str, nn.Module]) -> CoupledGroup | None:
    """Return the heads of an attention module, or None if its layout is unknown.

    Args:
        block: Index of its block.
        name: Its dotted name.
        attention: The module.
        linear: Its linear layers by their names in the module.
    """
    head = getattr(attention, "head_dim", None)
    output = next((linear[out] for out in _OUTPUTS if out in linear), None)
    if {"q_proj", "k_proj", "v_proj"} <= set(linear) and len(linear) == 4 and output is not None:
        sizes = {part: linear_shape(linear[part])[0] for part in ("q_proj", "k_proj", "v_proj")}
        if not isinstance(head, int) or sizes["k_proj"] != sizes["v_proj"] or sizes["q_proj"] % sizes["k_proj"]:
            return None
        units = sizes["k_proj"] // head
        rows = {part: torch.arange(size).view(units, -1) for part, size in sizes.items()}
        sides = [(part, "out", index) for part, index in rows.items()]
        sides += [(part, "in", rows["q_proj"]) for part in _OUTPUTS if part in linear]
    elif set(linear) == {"c_attn", "c_proj"} and isinstance(head, int):
        width = linear_shape(linear["c_proj"])[1]
        if linear_shape(linear["c_attn"])[0] != 3 * width:
            return None
        heads = torch.arange(width).view(-1, head)
        # Queries, keys and values of all heads side by side.
        sides = [("c_attn", "out", torch.cat([heads, heads + width, heads + 2 * width], 1)), ("c_proj", "in", heads)]
    else:
        return None
    # A norm over one head is the same for each head; a wider one would have to be cut too.
    own = {id(p) for layer in linear.values() for p in layer.parameters()}
    if any(id(p) not in own and p.numel() != head for p in attention.parameters()):
        return None
    members = tuple(
        Member(f"{name}.{part}", linear[part], side, index)  # type: ignore[arg-type]
        for part, side, index in sides
    )
    return CoupledGroup("heads", block, attention, members)


def mlp_group(block: int, name: str, mlp: nn.Module, linear: dict[str, nn.Module]) -> CoupledGroup | None:
    """Return the intermediate channels of an MLP as Torch-Pruning traces them, or None if they are not clear.

    Args:
        block: Index of its block.
        name: Its dotted name.
        mlp: The module; it takes and returns the residual stream.
        linear: Its linear layers by their names in the module.
    """
    first = next(iter(linear.values()))
    with undoing() as undo, torch.enable_grad(), evaluating(mlp):  # the tracer puts it in eval mode
        undo.keep_flags(mlp)
        mlp.requires_grad_(True)  # the tracer reads the autograd graph
        example = torch.zeros(1, 2, linear_shape(first)[1], dtype=first.weight.dtype, device=first.weight.device)  # type: ignore[arg-type]
        graph = tp.DependencyGraph().build_dependency(mlp, example, customized_pruners={Conv1D: Conv1DPruner()})
        groups = list(graph.get_all_groups(root_module_types=[nn.Linear, Conv1D]))
    # The residual stream is a group of outputs only.
    traced = [_members(graph, group, name, linear) for group in groups]
    inner = [members for members in traced if any(member.side == "in" for member in members)]
    if len(inner) != 1 or sorted(m.name for m in inner[0]) != sorted(f"{name}.{part}" for part in linear):
        return None
    return CoupledGroup("channels", block, mlp, tuple(inner[0]))


def _members(graph: tp.DependencyGraph, group: Any, name: str, linear: dict[str, nn.Module]) -> list[Member]:
    """Return the linear layers of a traced group, in the order of their names in the module."""
    names = {id(layer): part for part, layer in linear.items()}
    members = []
    for item in group:
        dependency, channels = item
        part = names.get(id(dependency.target.module))
        if part is None:
            continue
        order = sorted(zip(item.root_idxs, channels, strict=True))
        index = torch.tensor([channel for _, channel in order]).view(len(set(item.root_idxs)), -1)
        side: Literal["in", "out"] = "out" if graph.is_out_channel_pruning_fn(dependency.handler) else "in"
        members.append(Member(f"{name}.{part}", linear[part], side, index))
    return sorted(members, key=lambda member: list(linear.values()).index(member.layer))


def unit_scores(group: CoupledGroup, products: dict[str, Tensor]) -> Tensor:
    """Return the first-order importance of each unit, shape (units,): the sum of |w dL/dw| over all its weights.

    Ma, Fang and Wang 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models", Eq. 5 without its
    second-order term, summed over a group (their "param_first" with aggregation "sum"). Biases do not count.

    Args:
        group: The group.
        products: |W * dL/dW| of each layer by name, in the layout of its weight.
    """
    scores = torch.zeros(group.units, dtype=torch.float64)
    for member in group.members:
        product = products[member.name]
        if isinstance(member.layer, Conv1D):
            product = product.T
        channels = product.sum(1 if member.side == "out" else 0, dtype=torch.float64).cpu()
        scores += channels[member.index].sum(1)
    return scores


def weights_of(groups: Iterable[CoupledGroup]) -> dict[str, nn.Parameter]:
    """Return the weights of the groups' layers by name."""
    return {m.name: m.layer.weight for group in groups for m in group.members}  # type: ignore[misc]
