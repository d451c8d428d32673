"""Solvers: functions from a layer's weight and moments to a factorisation at every rank.

Each solver is a function ``(W, moments) -> Factorization`` in a file of its own. One registry finds it by its name, and
knows which statistics it needs besides the means.

| method | W'_k minimises | its losses are |
|---|---|---|
| fasc | tr(G D A D^T), D = W - W'; coupled A and G | E[(h^T D x)^2], squared change of the loss |
| fasc-plain | the same with plain A and G | the same |
| fisher-diag | the same with the diagonals of A and G | the same |
| gfwsvd | the same with A (x) G the Kronecker factors of the Fisher | squared change of a sequence's loss |
| fwsvd | the same with a diagonal Fisher that is constant along rows | the same |
| grad-svd | E of the squared norm of (I - P)(g*x), W' = W P | squared change of the loss, where P respects the axes |
| svd-llm | E of the squared norm of D x | squared outputs |
| svd | E of the squared norm of (I - P) x, W' = W P | squared inputs |
| asvd | the squared norm of D diag(E abs(x))^alpha | weights, scaled |
| weight-svd | the squared norm of D | squared weights |
| fasc-eq6, fasc-eq6-centred, fasc-eq6-literal | nothing: the printed eigenproblem | sums of its eigenvalues |
"""

from fasc_lightning.solvers._asvd import asvd as asvd
from fasc_lightning.solvers._fasc import SHRINK_A, SHRINK_COUPLED_G, SHRINK_G, coupled_metric, plain_metric
from fasc_lightning.solvers._fasc import fasc as fasc
from fasc_lightning.solvers._fasc import fasc_plain as fasc_plain
from fasc_lightning.solvers._fasc_eq6 import fasc_eq6 as fasc_eq6
from fasc_lightning.solvers._fasc_eq6 import fasc_eq6_centred as fasc_eq6_centred
from fasc_lightning.solvers._fasc_eq6 import fasc_eq6_literal as fasc_eq6_literal
from fasc_lightning.solvers._fisher_diag import fisher_diag as fisher_diag
from fasc_lightning.solvers._fwsvd import fwsvd as fwsvd
from fasc_lightning.solvers._gfwsvd import gfwsvd as gfwsvd
from fasc_lightning.solvers._grad_svd import grad_svd as grad_svd
from fasc_lightning.solvers._leading import leading
from fasc_lightning.solvers._linalg import SquareRoot, descending_eigh, shrink, square_root
from fasc_lightning.solvers._registry import available_methods as available_methods
from fasc_lightning.solvers._registry import get_solver as get_solver
from fasc_lightning.solvers._registry import register_solver as register_solver
from fasc_lightning.solvers._registry import solver_needs as solver_needs
from fasc_lightning.solvers._svd import svd as svd
from fasc_lightning.solvers._svd_llm import svd_llm as svd_llm
from fasc_lightning.solvers._two_sided import two_sided
from fasc_lightning.solvers._types import Factorization as Factorization
from fasc_lightning.solvers._types import Solver as Solver
from fasc_lightning.solvers._weight_svd import weight_svd as weight_svd

__all__ = [
    # methods
    "asvd",
    "fasc",
    "fasc_eq6",
    "fasc_eq6_centred",
    "fasc_eq6_literal",
    "fasc_plain",
    "fisher_diag",
    "fwsvd",
    "gfwsvd",
    "grad_svd",
    "svd",
    "svd_llm",
    "weight_svd",
    # registry
    "Factorization",
    "Solver",
    "available_methods",
    "get_solver",
    "register_solver",
    "solver_needs",
    "SHRINK_A",
    "SHRINK_COUPLED_G",
    "SHRINK_G",
    "SquareRoot",
    "coupled_metric",
    "descending_eigh",
    "leading",
    "plain_metric",
    "shrink",
    "square_root",
    "two_sided",
]
