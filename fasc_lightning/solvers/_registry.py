"""The registry of solvers by method name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fasc_lightning._utils import Registry
from fasc_lightning.solvers._types import Solver
from fasc_lightning.statistics import check_needs

_SOLVERS: Registry[Solver, frozenset[str]] = Registry("method", "solver", ("W", "moments"))


def register_solver(name: str, needs: Iterable[str] = ()) -> Callable[[Solver], Solver]:
    """Return a decorator that makes a solver available as ``method=name``, in this process.

    A solver takes the weight W (m, n) and the layer's moments
    (:class:`~fasc_lightning.statistics.LayerMoments`), and returns a :class:`Factorization`. It runs once for each
    layer, after the calibration, and must not change its arguments. The same function may be registered again, as when
    a cell of a notebook runs twice.

    Args:
        name: The method.
        needs: Statistics that the solver reads besides the means, of ``fasc_lightning.statistics.NEEDS``: a fit gathers
            these and no others. "plain" (A and G) is added unless "coupled" is the only one.

    Raises:
        TypeError: If the function does not take (W, moments), or if ``needs`` is no list of names.
        ValueError: If the name is another solver's, or a need is unknown.

    Example:
        >>> import torch
        >>> from fasc_lightning.solvers import available_methods, register_solver, two_sided
        >>> @register_solver("outputs")
        ... def outputs(W, moments):
        ...     A, _ = moments.plain_moments()
        ...     return two_sided(W, A, torch.eye(len(W), dtype=torch.float64))
        >>> "outputs" in available_methods()
        True
    """
    _SOLVERS.check_name(name)
    if isinstance(needs, str):
        raise TypeError(f"Expected `needs` to be a list of names but got {needs!r}. HINT: needs=[{needs!r}].")
    checked = check_needs(tuple(needs))

    def register(solver: Solver) -> Solver:
        _SOLVERS.add(name, solver, checked)
        return solver

    return register


def get_solver(name: str) -> Solver:
    """Return a solver by name.

    Raises:
        ValueError: If there is no such solver.
    """
    return _SOLVERS.function(name)


def solver_needs(name: str) -> frozenset[str]:
    """Return the statistics that a solver reads besides the means.

    Raises:
        ValueError: If there is no such solver.
    """
    return _SOLVERS.declared(name)


def available_methods() -> list[str]:
    """Return the names of all solvers, sorted."""
    return sorted(_SOLVERS.names)
