"""The registry of solvers by method name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fasc_lightning.solvers._types import Solver
from fasc_lightning.statistics import check_needs

_SOLVERS: dict[str, Solver] = {}
_NEEDS: dict[str, frozenset[str]] = {}


def register_solver(name: str, needs: Iterable[str] = ()) -> Callable[[Solver], Solver]:
    """Return a decorator that makes a solver available as ``method=name``.

    Args:
        name: The method.
        needs: Statistics that the solver reads besides the means (``NEEDS``); "plain" is added unless "coupled" is the
            only one.

    Raises:
        ValueError: If the name is taken, or a need is unknown.
    """
    checked = check_needs(needs)

    def register(solver: Solver) -> Solver:
        if name in _SOLVERS:
            raise ValueError(f"Expected a new solver name but {name!r} is registered already.")
        _SOLVERS[name] = solver
        _NEEDS[name] = checked
        return solver

    return register


def get_solver(name: str) -> Solver:
    """Return a solver by name.

    Raises:
        ValueError: If there is no such solver.
    """
    if name not in _SOLVERS:
        raise ValueError(f"Expected `method` to be one of {', '.join(available_methods())} but got {name!r}.")
    return _SOLVERS[name]


def solver_needs(name: str) -> frozenset[str]:
    """Return the statistics that a solver reads besides the means.

    Raises:
        ValueError: If there is no such solver.
    """
    get_solver(name)
    return _NEEDS[name]


def available_methods() -> list[str]:
    """Return the names of all solvers."""
    return sorted(_SOLVERS)
