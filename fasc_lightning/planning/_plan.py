"""``plan``: memory, time and size of a compression, before the first batch and without weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Unpack

import torch
from torch import nn

from fasc_lightning._utils import available_memory
from fasc_lightning.calibration import share_units, shares, sketches_for_budget
from fasc_lightning.compression import (
    check_fits,
    layers_dtype,
    statistics_needed,
)
from fasc_lightning.distributed import is_split
from fasc_lightning.layers import (
    TargetedLayers,
    layer_sizes,
    model_size,
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
from fasc_lightning.planning._stored_layers import (
    StoredLayer,
    activation_bytes,
    replaced_size,
    stored_layers,
    total_size,
)
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
    """Forecast the memory, time and sizes of a compression from shapes alone, without computing or reading weights.

    Memory is counted as the code uses it. Moments exist while batches run. Then each layer is factorised in float64 and
    its moments are freed. Its factors of every rank stay, on disk if there are several passes, until one budget has
    been spent over all layers. The memory of a refit or a recovery is not counted. To carry out the plan, give
    :class:`~fasc_lightning.FascCallback` the same arguments and ``forecast.options``.

    Args:
        model_or_config: A module on any device, the meta device included; or a transformers config.
        options: Options of the compression, for example a :class:`~fasc_lightning.FascCallback`. The plan chooses those
            parts of ``memory`` that are at their defaults.
        memory: Memory of the device, the weights included: bytes, or "80GB", "24GiB". None takes the available memory.
        device: Device of the compression; by default the module's, or the CPU if there are no weights. A device of
            another machine needs ``memory``.
        host_memory: Memory of the CPU that moments and factors may take beside another device; None allows none.
        dtype: Dtype of a config's model; None for the config's own.
        keeps_moments: Whether moments stay until the end, as a refit needs.
        sketch: Option ``sketch`` of :class:`~fasc_lightning.options.Memory`. "auto" holds moments whole if they fit,
            else "projected" if the options allow it, else "range".
        passes: Number of passes over the data, each for a share of the layers. None takes as few as fit, and one if
            weights are updated or moments kept.
        batch_tokens: Tokens of one batch, for its activations; 0 counts none.
        tokens: Tokens of the calibration, for its seconds.
        probed: Whether to measure the device's speed for a moment; or the rates to use.
        **keywords: Options of the compression (:class:`~fasc_lightning.options.CompressionOptions`); they override
            ``options``. Without either, the weights are frozen. If weights are updated, gradients and two optimizer
            states are counted, each as large as the weights. Ranks are given for a uniform allocation; other
            allocations spend the same budget.

    Raises:
        MemoryError: If no allowed storage fits; the message names remedies.
        TypeError: If the model is neither a module nor a config, or if an option is of a wrong type.
        ValueError: If a config lacks shapes, if an option is out of range, or if a module is on several devices without
            a ``device_map`` and without ``device``.

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
    needs, keeps_moments = (
        statistics_needed(how.method, how.gate_threshold, how.gate_by),
        how.refit is True or how.stages > 1,
    )
    kinds: tuple[ReductionKind | None, ...] = (None, "projected", "range")
    if sketch != "auto" or how.sketch is not None or how.rounds:
        kinds = (how.sketch,)
    elif how.method != "fasc" or how.gate_threshold is not None or how.update_weights or keeps_moments:
        kinds = (None, "range")
    sketching = {k: None if k is None else SketchOptions(k, how.sketch_size, how.sketch_above) for k in kinds}
    room, beside = bytes_of(memory, "memory"), bytes_of(host_memory, "host_memory")
    model = model_on_meta(model_or_config, dtype)
    chosen = target_layers(model, how.targets, how.exclude)
    check_fits(model, chosen, how)
    where = torch.device(device) if device is not None else _device(model)
    return forecast(
        model,
        chosen,
        stored_layers(model, chosen.modules, how),
        needs=needs,
        device=where,
        memory=room,
        host_memory=beside or 0,
        update_weights=how.update_weights,
        keeps_moments=keeps_moments,
        output_share=how.output_share,
        measured=how.measures,
        stages=how.stages,
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
    """Allowed storages of moments, each in the order of preference.

    Attributes:
        kinds: Sketches of layers by kind; None as a kind holds all moments whole.
        offloaded: Allowed values of ``Storage.offloaded``.
        passes: Number of passes; None for as few as fit.
        sizes: Options ``sketch_size`` and ``sketch_above`` of the sketches.
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
    output_share: float = 1.0,
    stages: int = 1,
    tiers: Tiers | None = None,
    batch_tokens: int = 0,
    tokens: int = 0,
    probed: bool | Rates = True,
) -> CompressionForecast:
    """Plan the compression of given layers; :func:`plan` selects them.

    Args:
        model: The model.
        chosen: Its selected layers.
        stored: The layers after the compression.
        needs: Statistics to gather.
        device: Device of the compression.
        memory: Bytes of the device, the weights included; None for the available memory.
        host_memory: Bytes of the CPU beside the device.
        update_weights: As the option of :class:`~fasc_lightning.options.Calibration`.
        keeps_moments: As in :func:`plan`.
        measured: Whether the budget is spent by measured losses.
        output_share: Share of the tokens that enter G.
        stages: As the option of :class:`~fasc_lightning.options.Calibration`.
        tiers: Allowed storages; by default whole moments, on the device, in one pass.
        batch_tokens: As in :func:`plan`.
        tokens: As in :func:`plan`.
        probed: As in :func:`plan`.

    Raises:
        MemoryError: If no allowed storage fits.
        ValueError: If ``memory`` is None and the device is not on this machine.
    """
    shapes, whole = chosen.shapes, model_size(model)
    tiers = tiers or Tiers()
    if memory is None:
        resident = (p.numel() * p.element_size() for p in model.parameters() if p.device.type == device.type)
        memory = _free(device) + sum(resident)
    if True in tiers.offloaded and host_memory == 0 and device.type != "cpu":
        host_memory = available_memory(torch.device("cpu"))
    sums, names = moment_dtype(chosen.modules.values()), list(shapes)

    @cache  # Models have tens of thousands of experts' projections, nearly all of one shape.
    def taken_by(m: int, n: int, sketches: LayerSketches | None) -> LayerMemory:
        return layer_memory(m, n, sketches=sketches, needs=needs, moments_dtype=sums)

    memories = {
        kind: [taken_by(m, n, sketches.get(name)) for name, (m, n) in shapes.items()]
        for kind, sketches in tiers.kinds.items()
    }
    training = 3 * whole.bytes if update_weights else 0
    targeted = {"dense": layer_sizes(chosen.modules), "compressed": total_size([s.size for s in stored.values()])}
    built = targeted["compressed"].bytes
    activations, units = batch_tokens * activation_bytes(model, chosen), share_units(names)

    def peak(storage: Storage) -> Peak:
        resident = whole.bytes + training
        # Several passes rule out a refit, so no moments are kept for one.
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
            stored[name].bits,
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
        whole={"dense": whole, "compressed": replaced_size(whole, targeted)},
        seconds=None
        if rates is None
        else _seconds(chosen, sketches, needs, rates, storage.passes, tokens, output_share, stages),
    )


def _options(
    options: CompressionOptions | None,
    keywords: Mapping[str, Any],
    sketch: str | None,
    passes: int | None,
    keeps_moments: bool,
) -> CompressionOptions:
    """Return the options in the arguments of :func:`plan`, checked together."""
    given = options_of(options, keywords, plan)
    if options is None and given.get("calibration") is None:
        given.setdefault("update_weights", False)
    if sketch != "auto":
        given["sketch"] = sketch
    if passes is not None:
        given["passes"] = passes
    if keeps_moments:
        given["refit"] = True
    found = CompressionOptions(**given)
    if not found.rounds:
        check_budget(found.rank, found.keep)
    return found


def _offloaded(named: str | None, host_memory: int | None, device: torch.device) -> tuple[bool, ...]:
    """Return the allowed values of ``Storage.offloaded``, in the order of preference."""
    if named not in (None, device.type):
        return (True,)
    return (False,) if host_memory is None or device.type == "cpu" else (False, True)


def _held(storage: Storage, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of FascCallback for a storage of moments, without options at their defaults."""
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
    output_share: float,
    stages: int,
) -> Seconds:
    """Return the seconds of all layers' operations; an expert sees its share of the tokens."""
    shapes, copies = chosen.shapes, len(needs & {"plain", "coupled"})
    model = stages * sum(chosen.token_shares[name] * model_work(m, n) for name, (m, n) in shapes.items())
    moments = stages * sum(
        chosen.token_shares[name] * moments_work(m, n, copies, sketches.get(name), output_share)
        for name, (m, n) in shapes.items()
    )
    return estimate(model, moments, sum(solver_work(m, n) for m, n in shapes.values()), rates, passes, tokens)


def _check_counts(passes: object, batch_tokens: object, tokens: object) -> None:
    least = {"passes": (passes, 1), "batch_tokens": (batch_tokens, 0), "tokens": (tokens, 0)}
    for name, (value, minimum) in least.items():
        if name == "passes" and value is None:
            continue
        if type(value) is not int or value < minimum:
            raise ValueError(f"Expected `{name}` to be an int of at least {minimum} but got {value!r}.")


def _device(model: nn.Module) -> torch.device:
    is_split(model)  # refuses several devices without a device_map, which leave the device open
    found = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if found.type == "meta" else found


def _present(device: torch.device) -> bool:
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())


def _free(device: torch.device) -> int:
    if not _present(device):
        raise ValueError(f"Expected `memory` together with device {device}, which is not there to ask, but got None.")
    return available_memory(device)


def _rates(device: torch.device, dtype: torch.dtype) -> Rates | None:
    """Return the rates of a device; None if it is not on this machine."""
    return probe(device, dtype) if _present(device) else None
