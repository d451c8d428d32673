"""LLM-Pruner: removal of the attention heads and MLP channels with the least first-order importance."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fasc_lightning._utils import block_of, evaluating, require, undoing
from fasc_lightning.layers import is_compressed, is_plain_linear, select_layers
from fasc_lightning.module import CausalLMModule
from fasc_lightning.studies.pruning._types import TaylorResult, check_keep, count_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fasc_lightning.studies.pruning._coupling import CoupledGroup

#: Attributes of modules with the sizes that are cut, if a family's classes have them.
_SIZES = ("num_heads", "num_attention_heads", "num_key_value_heads", "split_size", "intermediate_size")


def kept_ends(depth: int) -> tuple[int, int]:
    """Return how many first and last blocks stay whole, for a number of blocks.

    LLM-Pruner prunes blocks 4 to 29 of LLaMA-7B's 32: the first eighth and the last sixteenth stay. This function takes
    the same shares of any depth, rounded: 4 and 2 of 30 blocks, 2 and 1 of 12, none of 2.
    """
    return round(depth / 8), round(depth / 16)


def prune_llm(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    keep: float,
    keep_first: int | None = None,
    keep_last: int | None = None,
    targets: str | list[str] | None = None,
    exclude: str | list[str] | None = None,
) -> TaylorResult:
    """Remove attention heads and MLP channels from a causal language model, in place.

    The method is that of Ma, Fang and Wang 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models", with
    the package Torch-Pruning. Coupled rows and columns are one unit: an intermediate channel of the MLP, as traced by
    Torch-Pruning, or a key-value head with all of its query heads. A unit's importance is the sum of |w dL/dw| over its
    weights, where L is the sum of the batches' token losses. Each pruned block keeps the same fraction of units, the
    most important ones. The residual stream, embeddings and norms stay.

    The fraction is the largest that meets the budget. Heads are few, so they are rounded to the nearest number first,
    and the channels then fill the rest. Two points differ from the paper: grouped queries, which the paper's models
    lack, are cut as whole key-value groups, and no recovery by LoRA follows.

    Afterwards the model is either unchanged, or pruned and checked by a forward pass; it is never copied. It keeps its
    training mode, its flags and its gradients outside the cut layers. The parameters of cut layers are new objects, so
    an optimizer that holds the old ones has to be made again.

    Args:
        model: A causal language model of transformers with blocks of separate q, k, v and output projections (Llama,
            Mistral, Qwen2, Gemma 2, ...) or of GPT-2's kind.
        batches: Mappings with "input_ids" and optionally "attention_mask" and "labels", as for ``compress``. The
            paper uses 10 samples of 64 tokens.
        keep: The largest fraction of the targeted layers' weights to keep.
        keep_first: Number of first blocks to keep whole; None for :func:`kept_ends`. They count in the budget.
        keep_last: Number of last blocks to keep whole, with the same default.
        targets: Patterns as for ``select_layers``. Units are only cut if all of their layers are targeted.
        exclude: Patterns of layers to leave alone.

    Returns:
        The figures of the pruning. ``config_adjusted`` tells whether a saved model can be loaded again.

    Raises:
        ModuleNotFoundError: If torch-pruning is not installed.
        TypeError: If ``keep`` is not a number or a batch is no mapping.
        ValueError: If an option is out of range, the budget cannot be met, there is no batch, or the model's family or
            form cannot be pruned.
        FloatingPointError: If a gradient, or an output of the pruned model, is not finite.
    """
    check_keep(keep)
    start = time.perf_counter()
    layers = select_layers(model, targets, exclude)
    groups = _prunable(_coupled_groups(model, layers), layers, model, keep_first, keep_last)
    before, _ = count_weights(layers.values())
    kept = plan_units([(g.kind, g.units, g.unit_cost) for g in groups], before, keep)
    with evaluating(model):
        products, tokens, example = _taylor_products(model, groups, batches)
        with _undone_on_failure(model):
            for group, count in zip(groups, kept, strict=True):
                _cut(group, count, products)
            adjusted = _adjust_config(model, groups)
            _check_usable(model, example)
    after, zeros = count_weights(layers.values())
    return TaylorResult(
        "llm-pruner",
        keep,
        before,
        after,
        zeros,
        passes=1,
        tokens=tokens,
        seconds=time.perf_counter() - start,
        blocks=tuple(sorted({group.block for group in groups})),
        head_groups=_change(groups, kept, "heads"),
        channels=_change(groups, kept, "channels"),
        config_adjusted=adjusted,
    )


def plan_units(groups: list[tuple[Literal["heads", "channels"], int, int]], parameters: int, keep: float) -> list[int]:
    """Return how many units each group keeps: one fraction for all, then a larger one for channels if it fits.

    Args:
        groups: Kind, number of units and weights of one unit of each group.
        parameters: Weights of all targeted layers, also of layers in no group.
        keep: Budget as a fraction of ``parameters``.

    Raises:
        ValueError: If one unit per group already exceeds the budget.
    """

    def counts(heads: float, channels: float) -> list[int]:
        # Channels are many and rounded down; rounding 3 or 4 heads down would leave too few.
        wanted = [round(heads * u) if kind == "heads" else int(channels * u) for kind, u, _ in groups]
        return [max(1, count) for count in wanted]

    def held(kept: list[int]) -> int:
        return parameters - sum((u - k) * cost for k, (_, u, cost) in zip(kept, groups, strict=True))

    budget = keep * parameters
    if (least := held(counts(0.0, 0.0))) > budget:
        raise ValueError(
            f"Expected a budget that leaves a head and a channel in each pruned block but keep={keep} is less than "
            f"{least / parameters:.3f}, the share of these and of the layers that are not cut. HINT: raise "
            "`keep`, or lower `keep_first` and `keep_last`."
        )
    both = _largest(lambda f: held(counts(f, f)) <= budget)
    channels = _largest(lambda f: held(counts(both, f)) <= budget)
    return counts(both, channels)


def _largest(fits: Callable[[float], bool]) -> float:
    """Return the largest fraction that fits, to double precision; 0 fits, and so do all smaller fractions."""
    if fits(1.0):
        return 1.0
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _coupled_groups(model: PreTrainedModel, layers: Mapping[str, nn.Module]) -> list[CoupledGroup]:
    """Return the groups of every block with targeted layers.

    Raises:
        ModuleNotFoundError: If torch-pruning is not installed.
        ValueError: If the model's form cannot be pruned; the message names its family.
    """
    require("LLM-Pruner needs", "eval", "torch_pruning")
    from fasc_lightning.studies.pruning import _coupling as _coupling

    if is_compressed(model):
        raise ValueError(
            f"Expected a dense {type(model).__name__} but it holds low-rank layers, whose rows and columns cannot be "
            "cut. Start from the dense model."
        )
    owners: dict[str, tuple[int, dict[str, nn.Module]]] = {}
    stacks = {(stack, index) for name in layers if (found := block_of(name)) is not None for stack, index in [found]}
    for name, module in model.named_modules():
        place = block_of(name)
        if place in stacks and is_plain_linear(module):
            owner, _, part = name.rpartition(".")
            owners.setdefault(owner, (place[1], {}))[1][part] = module
    groups = []
    for owner, (block, linear) in owners.items():
        module = model.get_submodule(owner)
        # Attention first, because it cannot run on the residual stream alone as an MLP can.
        group = _coupling.attention_group(block, owner, module, linear)
        if group is None and not owner.rpartition(".")[2].isdecimal() and "att" not in owner.rpartition(".")[2]:
            try:
                group = _coupling.mlp_group(block, owner, module, linear)
            except Exception as error:  # the tracer has no error classes of its own
                raise ValueError(_refusal(model, owner, linear)) from error
        if group is None:
            raise ValueError(_refusal(model, owner, linear))
        groups.append(group)
    per_block = {(group.block, group.kind) for group in groups}
    if not groups or len({stack for stack, _ in stacks}) != 1 or len(per_block) != len(groups):
        raise ValueError(_refusal(model, "its blocks", dict(layers)))
    return groups


def _refusal(model: PreTrainedModel, where: str, linear: Mapping[str, nn.Module]) -> str:
    family = getattr(model.config, "model_type", type(model).__name__)
    return (
        f"LLM-Pruner cannot prune the family {family!r} ({type(model).__name__}): expected a single stack of "
        "blocks, each of one attention module with q_proj, k_proj, v_proj and an output projection (or GPT-2's "
        f"c_attn and c_proj) and one MLP module, but got {', '.join(list(linear)[:8])} in {where!r}. Use another "
        "method for this model."
    )


def _prunable(
    groups: list[CoupledGroup],
    layers: Mapping[str, nn.Module],
    model: PreTrainedModel,
    keep_first: int | None,
    keep_last: int | None,
) -> list[CoupledGroup]:
    """Return the groups of the blocks to prune whose layers are all targeted.

    Raises:
        ValueError: If ``keep_first`` or ``keep_last`` is out of range, or no group remains.
    """
    depth = 1 + max(group.block for group in groups)
    ends = kept_ends(depth)
    first, last = (end if given is None else given for end, given in zip(ends, (keep_first, keep_last), strict=True))
    if min(first, last) < 0 or first + last >= depth:
        raise ValueError(
            f"Expected `keep_first` and `keep_last` to leave some of the {depth} blocks to prune but got {first} and "
            f"{last}."
        )
    targeted = {id(layer) for layer in layers.values()}
    found = [
        group
        for group in groups
        if first <= group.block < depth - last and all(id(member.layer) in targeted for member in group.members)
    ]
    if not found:
        raise ValueError(
            f"Expected all layers of an attention or MLP module of {type(model).__name__} among the targets but no "
            "module has them all: rows of one layer can only be cut with the columns of another."
        )
    return found


def _taylor_products(
    model: PreTrainedModel, groups: list[CoupledGroup], batches: Iterable[Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], int, Tensor]:
    """Return |W * dL/dW| of each layer by name, the number of predicted tokens, and part of the first batch."""
    from fasc_lightning.studies.pruning._coupling import weights_of

    weights = weights_of(groups)
    module = CausalLMModule(model)
    totals: dict[str, Tensor] = {}
    tokens, example = 0, None
    with undoing() as undo:
        undo.keep_flags(model)
        for weight in weights.values():
            weight.requires_grad_(True)
        for number, batch in enumerate(batches):
            terms = module.loss_terms(batch)
            batch = {key: value.to(model.device) for key, value in batch.items() if isinstance(value, Tensor)}
            with torch.enable_grad():
                loss = module._loss(batch) * terms
            # Not backward(), which would change the model's own gradients.
            gradients = torch.autograd.grad(loss, list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                if not gradient.isfinite().all():
                    raise FloatingPointError(
                        f"Expected finite gradients but that of {name!r} in batch {number} is not (loss "
                        f"{loss.item()}). Check the batch and the model's dtype."
                    )
                totals[name] = gradient if name not in totals else totals[name].add_(gradient)
            tokens += terms
            example = batch["input_ids"][:1, :8] if example is None else example
    if example is None:
        raise ValueError("Expected at least one batch of calibration data but got none.")
    return {name: total.mul_(weights[name].detach()).abs_() for name, total in totals.items()}, tokens, example


def _cut(group: CoupledGroup, count: int, products: dict[str, Tensor]) -> None:
    """Remove all except the ``count`` most important units from a group's layers."""
    from fasc_lightning.studies.pruning._coupling import unit_scores

    before = group.units
    removed = unit_scores(group, products).argsort(stable=True)[: before - count]
    if not len(removed):
        return
    for member in group.members:
        member.cut(removed)
    for size in _SIZES:
        held = getattr(group.owner, size, None)
        speaks_of_it = size == "intermediate_size" if group.kind == "channels" else size != "intermediate_size"
        if isinstance(held, int) and speaks_of_it:
            setattr(group.owner, size, held // before * count)


def _adjust_config(model: PreTrainedModel, groups: list[CoupledGroup]) -> bool:
    """Write the new sizes into the configuration if it can hold them, and return whether it can."""
    from fasc_lightning.layers import linear_shape

    config = model.config
    sizes: dict[str, set[Any]] = {}
    for group in groups:
        shapes = {member.name.rpartition(".")[2]: linear_shape(member.layer) for member in group.members}
        if group.kind == "channels":
            inner = linear_shape(next(m.layer for m in group.members if m.side == "in"))[1]
            name = "n_inner" if hasattr(config, "n_inner") else "intermediate_size"
            sizes.setdefault(name, set()).add(inner)
        elif "q_proj" in shapes and hasattr(config, "num_key_value_heads"):
            head = group.owner.head_dim
            sizes.setdefault("num_attention_heads", set()).add(shapes["q_proj"][0] // head)  # type: ignore[operator]
            sizes.setdefault("num_key_value_heads", set()).add(shapes["k_proj"][0] // head)  # type: ignore[operator]
            sizes.setdefault("head_dim", set()).add(head)
        elif linear_shape(group.members[0].layer)[0] != 3 * config.hidden_size:
            return False
    uniform = all(len(values) == 1 for values in sizes.values())
    # Blocks that stay whole have the old sizes, but the configuration has one number for all blocks.
    whole = all(
        sum(group.kind == kind for group in groups) == getattr(config, "num_hidden_layers", None)
        for kind in {group.kind for group in groups}
    )
    if not (uniform and whole):
        return False
    for name, (value,) in sizes.items():
        setattr(config, name, value)
    return True


def _check_usable(model: PreTrainedModel, example: Tensor) -> None:
    with torch.no_grad():
        logits = model(example, use_cache=False).logits
    if not logits.isfinite().all():
        raise FloatingPointError(
            f"The pruned {type(model).__name__} gives logits that are not finite: it overflows in "
            f"{next(model.parameters()).dtype}. The model is unchanged."
        )


@contextmanager
def _undone_on_failure(model: PreTrainedModel) -> Iterator[None]:
    """Restore parameters, sizes and configuration after a failure; cutting makes new parameters, so none is lost."""
    with undoing() as undo:
        undo.keep(model, attributes=True)
        yield
        undo.forget()


def _change(groups: list[CoupledGroup], kept: list[int], kind: str) -> tuple[int, int]:
    """Return the units of one group of a kind, before and after."""
    return next(((g.units, k) for g, k in zip(groups, kept, strict=True) if g.kind == kind), (0, 0))
