"""plan(): memory, time and size of a compression, before the first batch and without a weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Unpack

import torch
from torch import nn

from fasc_lightning._utils import available_memory
from fasc_lightning.calibration import share_units, shares, sketches_for_budget
from fasc_lightning.compression import (
    Candidate,
    allocate_uniform,
    check_budget_fits,
    check_rank_fits,
    layer_budgets,
    layers_dtype,
    layout_cost,
    least_cost,
    statistics_needed,
)
from fasc_lightning.distributed import is_split
from fasc_lightning.layers import (
    Layout,
    Size,
    TargetedLayers,
    auto_layout,
    empty_layer,
    layer_sizes,
    linear_shape,
    model_size,
    smaller_side,
    target_layers,
)
from fasc_lightning.options import (
    Calibration,
    CompressionOptions,
    Memory,
    PlanKeywords,
    ReductionKind,
    SketchOptions,
    check_budget,
    checks_options,
    flat,
    options_of,
)
from fasc_lightning.planning._forecast import CompressionForecast, LayerForecast
from fasc_lightning.planning._memory import LayerMemory, Peak, Storage, choose_storage, layer_memory, peak_memory
from fasc_lightning.planning._model import model_on_meta
from fasc_lightning.planning._refusal import bytes_of, refusal
from fasc_lightning.planning._time import Rates, Seconds, estimate, model_work, moments_work, probe, solver_work
from fasc_lightning.statistics import LayerSketches, moment_dtype


@checks_options
def plan(
    model_or_config: Any,
    options: CompressionOptions | None = None,
    *,
    memory: int | float | str | None = None,
    device: torch.device | str | None = None,
    host_memory: int | float | str | None = None,
    dtype: torch.dtype | None = None,
    keeps_moments: bool = False,
    sketch: ReductionKind | Literal["auto"] | None = "auto",
    passes: int | None = None,
    batch_tokens: int = 0,
    tokens: int = 0,
    probed: bool | Rates = True,
    **keywords: Unpack[PlanKeywords],
) -> CompressionForecast:
    """Say what a compression will take and leave, from shapes alone: nothing is computed, and no weight is read.

    Memory is counted as the code uses it: moments while batches run; then one layer after the other is factorised in
    float64, its moments freed, its factors of every rank kept until one budget has been spent over all of them (on the
    disk, if there are several passes). What a refit or a recovery takes after that is not counted. With
    ``forecast.options`` :class:`~fasc_lightning.FascCallback` carries the plan out, next to what was given here.

    Args:
        model_or_config: A module on any device, the meta device included; or a transformers config.
        options: Those of the compression, as a :class:`~fasc_lightning.FascCallback` has them. What its ``memory``
            leaves at the defaults is chosen here.
        memory: Of the device, with what the weights take: bytes, or "80GB", "24GiB". None for what is there.
        device: What it is planned for; by default the module's, and the CPU for what has no weights. One that is not
            there needs ``memory``.
        host_memory: What moments and factors may take on the CPU beside another device; None keeps them off it.
        dtype: Of the weights that a config's model would have; None for the config's.
        keeps_moments: Whether moments stay until the end, as a refit needs them to.
        sketch: How moments are held, as :class:`~fasc_lightning.options.Memory` says; "auto" takes "projected" where
            whole moments do not fit and the options allow it, and "range" where that does not.
        passes: How often the data are gone through, with a share of the layers each; None for as few as fit, and one
            where the weights are updated or moments kept.
        batch_tokens: Tokens of one batch, for its activations; 0 counts none.
        tokens: Tokens of the calibration, for its seconds.
        probed: Whether to measure the device for a moment; or the rates to count with.
        **keywords: Options of the compression (:class:`~fasc_lightning.options.CompressionOptions`), in place of those
            in ``options``. Without either the weights are frozen. For weights that are updated, gradients and two
            states of an optimizer are counted, each as large as the weights. Ranks are given for a uniform allocation;
            the budget is that of any.

    Raises:
        MemoryError: If nothing that is allowed fits; it says what would.
        TypeError: If it is neither a module nor a config, or an option is of a wrong type.
        ValueError: If a config lacks shapes, an option is out of range, or a module is on several devices without a
            ``device_map`` and no ``device`` is named.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4)
        >>> plan(config, keep=0.8, memory="1GB", probed=False).passes
        1
    """
    _check_counts(passes, batch_tokens, tokens)
    if not isinstance(dtype, torch.dtype | None):
        raise TypeError(f"Expected `dtype` to be a dtype of torch or None but got {dtype!r}.")
    if not isinstance(probed, bool | Rates):
        raise TypeError(f"Expected `probed` to be True, False or rates but got {probed!r}.")
    how = _options(options, keywords, sketch, passes, keeps_moments)
    needs, keeps_moments = statistics_needed(how.method, how.gate_threshold, how.gate_by), how.refit is True
    kinds: tuple[ReductionKind | None, ...] = (None, "projected", "range")
    if sketch != "auto" or how.sketch is not None:
        kinds = (how.sketch,)
    elif how.method != "fasc" or how.gate_threshold is not None or how.update_weights or keeps_moments:
        kinds = (None, "range")
    sketching = {k: None if k is None else SketchOptions(k, how.sketch_size, how.sketch_above) for k in kinds}
    room, beside = bytes_of(memory, "memory"), bytes_of(host_memory, "host_memory")
    model = model_on_meta(model_or_config, dtype)
    chosen = target_layers(model, how.targets, how.exclude)
    check_rank_fits(chosen.shapes, how.rank)
    check_budget_fits(chosen.modules, how.rank, how.keep, how.allocation, how.layout, how.align)
    where = torch.device(device) if device is not None else _device(model)
    return forecast(
        model,
        chosen,
        stored_layers(chosen.modules, how.rank, how.keep, how.layout, how.align),
        needs=needs,
        device=where,
        memory=room,
        host_memory=beside or 0,
        update_weights=how.update_weights,
        keeps_moments=keeps_moments,
        measured=how.allocation == "measured",
        tiers=Tiers(
            kinds={k: sketches_for_budget(chosen.shapes, kept, how.rank, how.keep) for k, kept in sketching.items()},
            offloaded=_offloaded(how.moments_device, beside, where),
            passes=1 if how.update_weights or keeps_moments else passes or (how.passes if how.passes > 1 else None),
            sizes={"sketch_size": how.sketch_size, "sketch_above": how.sketch_above},
        ),
        batch_tokens=batch_tokens,
        tokens=tokens,
        probed=probed,
    )


@dataclass(frozen=True)
class Tiers:
    """How moments may be held, each in the order of preference.

    Attributes:
        kinds: Which sides of which layers are not held whole, by how they are held then; None for all whole.
        offloaded: Whether moments and factors may or must be on the CPU beside the device.
        passes: How many passes; None for as few as fit.
        sizes: ``sketch_size`` and ``sketch_above``, by which sketches were chosen.
    """

    kinds: Mapping[ReductionKind | None, Mapping[str, LayerSketches]] = field(default_factory=lambda: {None: {}})
    offloaded: tuple[bool, ...] = (False,)
    passes: int | None = 1
    sizes: Mapping[str, Any] = field(default_factory=dict)


def forecast(
    model: nn.Module,
    chosen: TargetedLayers,
    stored: Mapping[str, StoredLayer],
    *,
    needs: frozenset[str],
    device: torch.device,
    memory: int | None = None,
    host_memory: int = 0,
    update_weights: bool = False,
    keeps_moments: bool = False,
    measured: bool = False,
    tiers: Tiers | None = None,
    batch_tokens: int = 0,
    tokens: int = 0,
    probed: bool | Rates = True,
) -> CompressionForecast:
    """Plan for given layers; :func:`plan` finds them, and says what the options mean.

    Args:
        model: The model.
        chosen: Its layers.
        stored: What they become.
        needs: What is gathered.
        device: What it is planned for.
        memory: Bytes of it, with what the weights take; None for what is there.
        host_memory: Bytes on the CPU beside it.
        update_weights: See :func:`plan`.
        keeps_moments: Likewise.
        measured: Whether the budget is spent by measured losses.
        tiers: How moments may be held; whole, on the device and in one pass by default.
        batch_tokens: See :func:`plan`.
        tokens: Likewise.
        probed: Likewise.

    Raises:
        MemoryError: If nothing that is allowed fits.
        ValueError: If the device is not there to say how much memory it has.
    """
    shapes, whole = chosen.shapes, model_size(model)
    tiers = tiers or Tiers()
    if memory is None:
        resident = (p.numel() * p.element_size() for p in model.parameters() if p.device.type == device.type)
        memory = _free(device) + sum(resident)
    if True in tiers.offloaded and host_memory == 0 and device.type != "cpu":
        host_memory = available_memory(torch.device("cpu"))
    sums, names = moment_dtype(chosen.modules.values()), list(shapes)

    @cache  # of tens of thousands of experts' projections nearly all are alike
    def taken_by(m: int, n: int, sketches: LayerSketches | None) -> LayerMemory:
        return layer_memory(m, n, sketches=sketches, needs=needs, moments_dtype=sums)

    memories = {
        kind: [taken_by(m, n, sketches.get(name)) for name, (m, n) in shapes.items()]
        for kind, sketches in tiers.kinds.items()
    }
    training = 3 * whole.bytes if update_weights else 0
    targeted = {"dense": layer_sizes(chosen.modules), "compressed": _total([s.size for s in stored.values()])}
    built = targeted["compressed"].bytes
    activations, units = batch_tokens * activation_bytes(model, chosen), share_units(names)

    def peak(storage: Storage) -> Peak:
        resident = whole.bytes + training
        # Where there are several passes, there is no refit that moments would be kept for.
        consume = storage.passes > 1 or not keeps_moments
        return peak_memory(memories[storage.kind], storage, resident, activations, consume, units, built, measured)

    have = Peak(memory, host_memory)
    storage = choose_storage(
        peak, have, kinds=list(memories), offloaded=tiers.offloaded, passes=tiers.passes, most=len(units)
    )
    if storage is None:
        raise MemoryError(refusal(memories, shapes, peak, have, device, whole.bytes, tiers.passes or 1, len(units)))
    taken, sketches = memories[storage.kind], tiers.kinds[storage.kind]
    aside = storage.offloaded or device.type == "cpu"
    layers = [
        LayerForecast(
            name,
            shape,
            storage.kind or "exact" if name in sketches else "exact",
            "cpu" if aside else "device",
            taken[i].moments,
            stored[name].rank,
            stored[name].layout,
        )
        for i, (name, shape) in enumerate(shapes.items())
    ]
    rates = probed if isinstance(probed, Rates) else _rates(device, layers_dtype(chosen.modules)) if probed else None
    parts = shares([layer.moments for layer in taken], storage.passes, units)
    return CompressionForecast(
        layers=layers,
        device=str(device),
        memory=memory,
        host_memory=have.host,
        peak=peak(storage),
        parts={
            "weights": whole.bytes,
            "training": training,
            "activations": activations,
            "moments": max(sum(taken[i].moments for i in part) for part in parts),
            "factors": sum(layer.factors for layer in taken),
            "workspace": max(layer.workspace for layer in taken),
        },
        factors_place="disk" if storage.passes > 1 else "cpu" if aside else "device",
        passes=storage.passes,
        options=_held(storage, tiers.sizes),
        targeted=targeted,
        whole={"dense": whole, "compressed": _replaced(whole, targeted)},
        seconds=None if rates is None else _seconds(chosen, sketches, needs, rates, storage.passes, tokens),
    )


def _options(
    options: CompressionOptions | None,
    keywords: Mapping[str, Any],
    sketch: str | None,
    passes: int | None,
    keeps_moments: bool,
) -> CompressionOptions:
    """Return the options that :func:`plan` was given, checked together."""
    given = options_of(options, keywords)
    if options is None and given.get("calibration") is None:
        given.setdefault("update_weights", False)
    if sketch != "auto":
        given["sketch"] = sketch
    if passes is not None:
        given["passes"] = passes
    if keeps_moments:
        given["refit"] = True
    found = CompressionOptions(**given)
    check_budget(found.rank, found.keep)
    return found


def _offloaded(named: str | None, host_memory: int | None, device: torch.device) -> tuple[bool, ...]:
    """Return whether moments may or must be on the CPU beside a device."""
    if named not in (None, device.type):
        return (True,)
    return (False,) if host_memory is None or device.type == "cpu" else (False, True)


def _held(storage: Storage, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of FascCallback that hold moments in a certain way, those at their defaults left out."""
    memory = Memory(
        sketch=storage.kind,
        device="cpu" if storage.offloaded else None,
        passes=storage.passes,
        **(sizes if storage.kind in ("range", "gaussian") else {}),
    )
    trains = storage.passes == 1 and storage.kind != "projected"
    return flat("memory", memory) | flat("calibration", Calibration(update_weights=trains))


def _seconds(
    chosen: TargetedLayers,
    sketches: Mapping[str, LayerSketches],
    needs: frozenset[str],
    rates: Rates,
    passes: int,
    tokens: int,
) -> Seconds:
    """Return what the operations of all layers take; an expert sees its share of the tokens."""
    shapes, copies = chosen.shapes, len(needs & {"plain", "coupled"})
    model = sum(chosen.token_shares[name] * model_work(m, n) for name, (m, n) in shapes.items())
    moments = sum(
        chosen.token_shares[name] * moments_work(m, n, copies, sketches.get(name)) for name, (m, n) in shapes.items()
    )
    return estimate(model, moments, sum(solver_work(m, n) for m, n in shapes.values()), rates, passes, tokens)


@dataclass(frozen=True)
class StoredLayer:
    """How a layer is stored after a compression: rank, layout and size."""

    rank: int
    layout: str
    size: Size


def stored_layers(
    layers: Mapping[str, nn.Module], rank: float | None, keep: float | None, layout: Layout, align: int = 1
) -> dict[str, StoredLayer]:
    """Return what each layer becomes if every one of them spends its own share of the budget.

    An allocation that spends it over all layers chooses other ranks, within the same budget. A layer whose share does
    not hold its lowest rank has that one.

    Args:
        layers: Linear layers by name; no weight is read.
        rank: See ``layer_budgets``.
        keep: Likewise.
        layout: See :class:`~fasc_lightning.FascCallback`.
        align: Likewise.
    """
    dtype = layers_dtype(layers)
    cost, budgets = layout_cost(layout, dtype), layer_budgets(dict(layers), rank, keep)
    known: dict[tuple[Any, ...], StoredLayer] = {}
    stored = {}
    for name, layer in layers.items():
        m, n = linear_shape(layer)
        bias = getattr(layer, "bias", None) is not None
        key = m, n, bias, budgets[name], type(layer), getattr(layer, "expert_share", None)
        if key not in known:
            candidate = Candidate(name, m, n, torch.zeros(min(m, n) + 1).double().numpy())
            budget = max(budgets[name], least_cost(m, n, cost, align))
            (k,) = allocate_uniform([candidate], [budget], cost, align)
            known[key] = _stored(layer, m, n, k, bias, layout, dtype)
        stored[name] = known[key]
    return stored


def _stored(
    layer: nn.Module, m: int, n: int, k: int | None, bias: bool, layout: Layout, dtype: torch.dtype
) -> StoredLayer:
    held = "dense" if k is None else auto_layout(m, n, k, dtype) if layout == "auto" else layout
    if k is None or held == "dense":
        return StoredLayer(min(m, n), "dense", layer_sizes({"": layer}))
    spec = {"rank": k, "layout": held, "bias": bias, "side": smaller_side(m, n)}
    empty = empty_layer("", layer, spec)
    if (share := getattr(layer, "expert_share", None)) is not None:
        vars(empty)["expert_share"] = share  # for the count of FLOPs
    return StoredLayer(k, held, layer_sizes({"": empty}))


def activation_bytes(model: nn.Module, chosen: TargetedLayers) -> int:
    """Return roughly what one token's activations take between the forward and the backward pass, in bytes.

    The inputs and the outputs of the layers and a quarter more, for what norms, attention and the activation function
    of an MLP keep beyond the inputs that layers share: 10 h + 4 i + 2 kv numbers a block of Llama's, where layers have
    9 h + 3 i + 2 kv. And four times the logits in float32: themselves, their log-softmax and the gradients of both.

    Args:
        model: Says how many logits there are, by its output embeddings.
        chosen: The layers.
    """
    itemsize = layers_dtype(chosen.modules).itemsize
    held = sum(chosen.token_shares[name] * (m + n) for name, (m, n) in chosen.shapes.items())
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    logits = 0 if output is None else len(output.weight)
    return math.ceil(1.25 * held * itemsize + 4 * logits * torch.float32.itemsize)


def _check_counts(passes: object, batch_tokens: object, tokens: object) -> None:
    least = {"passes": (passes, 1), "batch_tokens": (batch_tokens, 0), "tokens": (tokens, 0)}
    for name, (value, minimum) in least.items():
        if name == "passes" and value is None:
            continue
        if type(value) is not int or value < minimum:
            raise ValueError(f"Expected `{name}` to be an int of at least {minimum} but got {value!r}.")


def _device(model: nn.Module) -> torch.device:
    is_split(model)  # refuses several devices that nothing brings together: which one is meant?
    found = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if found.type == "meta" else found


def _present(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())


def _free(device: torch.device) -> int:
    if not _present(device):
        raise ValueError(f"Expected `memory` together with device {device}, which is not there to ask, but got None.")
    return available_memory(device)


def _rates(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """Return the rates of a device; None of one that is not there."""
    return probe(device, dtype) if _present(device) else None


def _total(sizes: list[Size]) -> Size:
    return Size(
        sum(size.parameters for size in sizes),
        sum(size.bytes for size in sizes),
        sum(size.flops_per_token for size in sizes),
    )


def _replaced(whole: Size, targeted: Mapping[str, Size]) -> Size:
    """Return the size of a model whose targeted layers are replaced."""
    before, after = targeted["dense"], targeted["compressed"]
    return Size(
        whole.parameters - before.parameters + after.parameters,
        whole.bytes - before.bytes + after.bytes,
        whole.flops_per_token - before.flops_per_token + after.flops_per_token,
    )
