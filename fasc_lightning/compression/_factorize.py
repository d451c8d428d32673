"""Factorisations of every layer to every rank, from moments that are then let go of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from fasc_lightning._utils import Progress
from fasc_lightning.compression._objective import fisher_losses, fisher_metric
from fasc_lightning.distributed import whole
from fasc_lightning.layers import linear_weight
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

#: What losses are stated and allocated in: each solver's own unit, or J of the Fisher metric for all of them.
Unit = Literal["own", "fisher"]
UNITS: tuple[Unit, ...] = ("own", "fisher")


@dataclass
class FactorizedLayers:
    """Factorisations of every rank, and what has to be known of layers once their moments are gone.

    Attributes:
        factorizations: By layer; not of those whose gradients never came or were all zero.
        tokens: Behind each layer's statistics; 0 where no gradient came.
        solvers: What served each layer, or would have.
        sketches: Figures of the sketched sides of each layer that was factorised
            (``sketch_figures``).
        compare: Whether losses are J of the Fisher metric, in which layers compare whatever their solver.
    """

    factorizations: dict[str, Factorization]
    tokens: dict[str, int]
    solvers: dict[str, str]
    sketches: dict[str, dict[str, SketchFigures]]
    compare: bool

    def join(self, other: FactorizedLayers) -> FactorizedLayers:
        """Return these and those of other layers.

        Raises:
            ValueError: If the losses of the two are in different units.
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
    """Factorise layers one after the other, to every rank; the layers themselves are only read.

    Layers whose gradients never came, or were all zero, are left out. Experts with few tokens borrow from those of
    their block (``statistics/_expert_pooling.py``).

    Each solver states its losses in a unit of its own (squared loss, output or input), and one budget cannot be spent
    over several units. So as soon as a layer is on another solver than ``method``, all losses are J of the Fisher
    metric: the unit of "fasc", whose losses stay as they are, and the only one of these in which layers compare.
    With ``method="svd-llm"`` a single layer on "svd" therefore moves every layer's losses to that unit. ``unit`` asks
    for it where one solver serves all: the ranks that J would give it, instead of those of its own objective. J of a
    solver that does not minimise it may rise with the rank; the allocation takes the best of all ranks anyway.

    Args:
        layers: The targeted layers by name.
        moments: Their moments.
        method: Solver.
        device: Where to factorise.
        progress: Wraps the loop over layers.
        methods: Solver of single layers by name, in place of ``method``.
        consume: Whether to free each layer's moments once they are used, so that memory does not grow. Moments that
            are kept can serve another run.
        unit: "own": losses as each solver states them; "fisher": J of the Fisher metric, in which layers compare.
        known: Factorisations by layer from an earlier call with the same layers, moments, solvers and unit, which are
            not made again; those that are made are put in. For other budgets, allocations and layouts.
        hold: Puts finished factors where they wait for the others; by default that is where the moments are.

    Raises:
        ValueError: If the unit is unknown, ``methods`` names a layer or a solver that there is not, or a solver needs
            statistics that were not gathered.
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
    return FactorizedLayers(factorizations, tokens, solvers, sketches, fisher or method in FISHER_METHODS)


def _solvers(layers: Mapping[str, nn.Module], method: str, methods: Mapping[str, str]) -> dict[str, str]:
    """Return the solver of every layer, checked before any work is done."""
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
    """Refuse solvers whose statistics are not there, before any work is done."""
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
    """Run the solver; None where every gradient was zero, so that the loss says nothing about the layer."""
    if not bool(statistics.plain_moments()[1].diagonal().any()):
        return None
    W, statistics = whole(linear_weight(module).detach()).to(device), statistics.to(device)
    found = get_solver(method)(W, statistics)
    losses = found.losses
    if fisher and method not in FISHER_METHODS:
        losses = fisher_losses(W, *fisher_metric(statistics), found)
    storage = torch.promote_types(W.dtype, torch.float32)
    # float32 halves the memory of holding every layer's factors until ranks are known.
    return Factorization(found.left.to(storage), found.right.to(storage), losses.cpu())
