"""Factorisations of every layer at every rank; each layer's moments are freed after use."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from fasc_lightning._utils import FreedMemory, Progress
from fasc_lightning.compression._objective import fisher_losses, fisher_metric
from fasc_lightning.distributed import whole
from fasc_lightning.layers import linear_shape, linear_weight
from fasc_lightning.solvers import Factorization, get_solver, solver_needs
from fasc_lightning.statistics import (
    BorrowedMoments,
    CalibrationMoments,
    LayerMoments,
    LayerSketches,
    SketchFigures,
    not_gathered,
    sketch_figures,
)

#: Solvers whose own losses are J in the metric of :func:`~fasc_lightning.compression.fisher_metric`.
FISHER_METHODS = frozenset({"fasc"})

#: The unit of losses in factorisations and allocation: each solver's own, or J of the Fisher metric for all solvers.
Unit = Literal["own", "fisher"]
UNITS: tuple[Unit, ...] = ("own", "fisher")


@dataclass
class FactorizedLayers:
    """Factorisations at every rank, and the facts about the layers that outlive their moments.

    Attributes:
        factorizations: By layer; without the layers that no gradient, or only zeros, reached.
        tokens: Number of tokens in each layer's statistics; 0 if no gradient came.
        solvers: The solver of each layer, factorised or not.
        sketches: Figures of the sketched sides of each layer that was factorised
            (``sketch_figures``).
        compare: Whether losses are J of the Fisher metric; then layers with different solvers compare.
    """

    factorizations: dict[str, Factorization]
    tokens: dict[str, int]
    solvers: dict[str, str]
    sketches: dict[str, dict[str, SketchFigures]]
    compare: bool

    def leave_out(self, names: Iterable[str]) -> None:
        """Drop layers, which are then no part of the compression."""
        tables: tuple[dict[str, Any], ...] = (self.factorizations, self.tokens, self.solvers, self.sketches)
        for name in names:
            for table in tables:
                table.pop(name, None)

    def join(self, other: FactorizedLayers) -> FactorizedLayers:
        """Return the factorisations of these layers and of others together.

        Raises:
            ValueError: If their losses are in different units.
        """
        if self.compare != other.compare:
            raise ValueError("Expected losses in one unit for all layers but got J of the Fisher metric for some only.")
        return FactorizedLayers(
            {**self.factorizations, **other.factorizations},
            {**self.tokens, **other.tokens},
            {**self.solvers, **other.solvers},
            {**self.sketches, **other.sketches},
            self.compare,
        )


def factorize_layers(
    layers: dict[str, nn.Module],
    moments: CalibrationMoments,
    *,
    method: str = "fasc",
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    methods: Mapping[str, str] | None = None,
    consume: bool = True,
    unit: Unit = "own",
    known: MutableMapping[str, Factorization] | None = None,
    hold: Callable[[Factorization], Factorization] | None = None,
) -> FactorizedLayers:
    """Factorise layers one after the other, at every rank; the layers themselves are only read.

    Layers that no gradient, or only zeros, reached are left out. Experts with few tokens borrow statistics from the
    other experts of their block (``statistics/_expert_pooling.py``).

    Each solver states its losses in its own unit (squared loss, output or input), and one budget cannot be spent over
    several units. So as soon as one layer uses another solver than ``method``, all losses become J of the Fisher
    metric. J is the unit of "fasc", whose losses stay as they are, and the only unit in which layers compare. For
    example, with ``method="svd-llm"`` a single layer on "svd" moves every layer's losses to J. ``unit="fisher"`` asks
    for J if one solver serves all layers: the ranks then follow J and not the solver's own objective. J may rise with
    the rank for a solver that does not minimise it; the allocation compares all ranks and takes the best.

    Args:
        layers: The targeted layers by name.
        moments: Their moments.
        method: Solver.
        device: The device that factorises.
        progress: Wraps the loop over layers.
        methods: Solvers of single layers by name, instead of ``method``.
        consume: Whether to free each layer's moments after use, so that memory does not grow. Kept moments can serve
            another run.
        unit: "own" for losses in each solver's unit; "fisher" for J of the Fisher metric, in which layers compare.
        known: Factorisations by layer from an earlier call with the same layers, moments, solvers and unit. They are
            not computed again, and new ones are added. They serve other budgets, allocations and layouts.
        hold: Moves finished factors to the place where they wait for the other layers; by default the moments' device.

    Raises:
        ValueError: If the unit is unknown, ``methods`` names an unknown layer or solver, or a solver needs statistics
            that were not gathered.
    """
    if unit not in UNITS:
        raise ValueError(f"Expected `unit` to be one of {', '.join(UNITS)} but got {unit!r}.")
    progress = progress or (lambda names, description: names)
    solvers = _solvers(layers, method, methods or {})
    _check_gathered(solvers.values(), moments)
    fisher = unit == "fisher" or any(solver != method for solver in solvers.values())
    tokens = {name: moments.tokens(name) for name in layers}
    borrowed = BorrowedMoments(moments, layers)
    borrowed.say()
    factorizations: dict[str, Factorization] = {}
    sketches: dict[str, dict[str, SketchFigures]] = {}
    freed = FreedMemory()
    for name in progress([name for name in layers if tokens[name] > 0], "Factorising"):
        factorization = None if known is None else known.get(name)
        if factorization is None:
            statistics = borrowed.layer(name)
            sketches[name] = sketch_figures(moments.sketches.get(name, LayerSketches()), statistics)
            factorization = _factorize(layers[name], statistics, solvers[name], fisher, device)
            del statistics  # as large as the moments themselves
        if factorization is not None:
            factorizations[name] = factorization.to(moments.device) if hold is None else hold(factorization)
            if known is not None:
                known[name] = factorizations[name]
        if consume:
            moments.release(name)
            freed.add(torch.float64.itemsize * math.prod(linear_shape(layers[name])))
    return FactorizedLayers(factorizations, tokens, solvers, sketches, fisher or method in FISHER_METHODS)


def _solvers(layers: Mapping[str, nn.Module], method: str, methods: Mapping[str, str]) -> dict[str, str]:
    """Return the solver of every layer; the names are checked before any work."""
    unknown = [name for name in methods if name not in layers]
    if unknown:
        raise ValueError(
            f"Expected `methods` to name targeted layers but {unknown[0]!r} is none of the {len(layers)} (for example "
            f"{', '.join(list(layers)[:3])})."
        )
    for solver in {method, *methods.values()}:
        get_solver(solver)
    return {name: methods.get(name, method) for name in layers}


def _check_gathered(solvers: Iterable[str], moments: CalibrationMoments) -> None:
    """Refuse solvers whose statistics were not gathered, before any work."""
    for solver in set(solvers):
        if missing := sorted(solver_needs(solver) - moments.needs):
            raise not_gathered(missing[0], f"the solver {solver!r}")


def _factorize(
    module: nn.Module,
    statistics: LayerMoments,
    method: str,
    fisher: bool,
    device: torch.device | str,
) -> Factorization | None:
    """Run the solver; None if every gradient was zero, because the loss then says nothing about the layer."""
    if not bool(statistics.plain_moments()[1].diagonal().any()):
        return None
    W, statistics = whole(linear_weight(module).detach()).to(device), statistics.to(device)
    found = get_solver(method)(W, statistics)
    if not isinstance(found, Factorization):
        raise TypeError(f"Expected the solver {method!r} to return a Factorization but got {type(found).__name__}.")
    losses = found.checked((W.shape[0], W.shape[1]), method).losses
    if fisher and method not in FISHER_METHODS:
        losses = fisher_losses(W, *fisher_metric(statistics), found)
    storage = torch.promote_types(W.dtype, torch.float32)
    # float32 halves the memory of every layer's factors, which wait until ranks are known.
    return Factorization(found.left.to(storage), found.right.to(storage), losses.cpu())
