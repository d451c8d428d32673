"""Solvers: a layer's weight and moments in, a ranked factorisation out.

Every solver is a function ``(W, moments) -> Factorization`` in a file of its own, found by name in one registry.
"""

from fasc_lightning.solvers._registry import available_methods as available_methods
from fasc_lightning.solvers._registry import get_solver as get_solver
from fasc_lightning.solvers._registry import register_solver as register_solver
from fasc_lightning.solvers._types import Factorization as Factorization
from fasc_lightning.solvers._types import Solver as Solver
from fasc_lightning.solvers.fasc import fasc as fasc
from fasc_lightning.solvers.svd import svd as svd
from fasc_lightning.solvers.svd_llm import svd_llm as svd_llm

__all__ = [
    # methods
    "fasc",
    "svd",
    "svd_llm",
    # registry
    "Factorization",
    "Solver",
    "available_methods",
    "get_solver",
    "register_solver",
]
