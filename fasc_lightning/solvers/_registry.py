"""The registry of solvers by method name."""

from __future__ import annotations

from collections.abc import Callable

from fasc_lightning.solvers._types import Solver

_SOLVERS: dict[str, Solver] = {}


def register_solver(name: str) -> Callable[[Solver], Solver]:
    """Return a decorator that makes a solver available as ``method=name``.

    Raises:
        ValueError: If the name is taken.
    """

    def register(solver: Solver) -> Solver:
        if name in _SOLVERS:
            raise ValueError(f"Expected a new solver name but {name!r} is registered already.")
        _SOLVERS[name] = solver
        return solver

    return register


def get_solver(name: str) -> Solver:
    """Return a solver by name.

    Raises:
        ValueError: If there is none of that name.
    """
    if name not in _SOLVERS:
        raise ValueError(f"Expected `method` to be one of {', '.join(available_methods())} but got {name!r}.")
    return _SOLVERS[name]


def available_methods() -> list[str]:
    """Return the names of all solvers."""
    return sorted(_SOLVERS)
