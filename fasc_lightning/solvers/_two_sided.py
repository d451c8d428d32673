"""The closed-form minimiser of tr(G D A D^T), D = W - W', that most solvers share."""

from __future__ import annotations

import torch
from torch import Tensor

from fasc_lightning.solvers._linalg import descending_eigh, square_root, tail_sums
from fasc_lightning.solvers._types import Factorization
from fasc_lightning.statistics import ProjectedMoment, SecondMoment, congruence, dense


def two_sided(W: Tensor, A: SecondMoment, G: SecondMoment) -> Factorization:
    r"""Minimise tr(G D A D^T), D = W - W', over all W' of each rank.

    With any R_A R_A^T = A and R_G^T R_G = G, let M = R_G W R_A = U S V^T. The optimum is W'_k = R_G^-1 U_k S_k V_k^T
    R_A^-1, and its loss is the sum of s_i^2 beyond k (Eckart and Young 1936 in the metric of the two factors). Because
    U_k S_k V_k^T = U_k U_k^T M, one root cancels: W'_k = R_G^-1 U_k U_k^T R_G W. U holds the eigenvectors of M M^T =
    R_G (W A W^T) R_G^T, so only the smaller side needs a root and an eigh. A sketched moment of the larger side
    therefore stays low-rank. On the smaller side it becomes a matrix, which is no larger than W.

    Note the orientation: with Cholesky's G = L L^T, R_G is L^T, not L.

    Args:
        W: Shape (m, n).
        A: Symmetric positive semidefinite, shape (n, n).
        G: Symmetric positive semidefinite, shape (m, m).

    Returns:
        The factorisation: factors in W's dtype or in float32, whichever is wider, and losses in float64.
    """
    m, n = W.shape
    if m > n:  # the same problem for W^T, whose smaller side is its outputs
        transposed = two_sided(W.T, G, A)
        return Factorization(transposed.right.T, transposed.left.T, transposed.losses)
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    A, G = A.double(), dense(G.double())
    root = square_root(G)  # L with G = L L^T
    # A projected moment reads W for its ridge alone.
    seen = congruence(W if isinstance(A, ProjectedMoment) else W.double(), A)
    spectrum, U = descending_eigh(root.L.T @ seen @ root.L)
    # The product with W needs no float64: the rows' errors add their squares, in A, to the loss, since R_G times the
    # other factor is orthonormal.
    left, through = root.solve_transposed(U).to(W.dtype), (root.L @ U).T.to(W.dtype)
    return Factorization(left, through @ W, tail_sums(spectrum))
