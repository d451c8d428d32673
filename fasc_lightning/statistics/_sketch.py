r"""Sketches of second moments that are too wide to hold: one pass, sums that merge, rebuilt as low rank plus a rest.

The range finder holds Y = A Omega with a random Omega (d, s), the running sum of X^T (X Omega): s d numbers, not d^2.
Omega has eight signs a row (sparse sign matrices: Tropp, Yurtsever, Udell and Cevher 2019, "Streaming low-rank matrix
approximation", section 3), so X Omega is nearly free. It comes from a seed; for the widths in use, only the positions
of the signs are held. Beside Y are the exact diagonal of A, and A Psi for a few held-out signs Psi, which estimate the
error of the rebuilt matrix. All of these are sums over tokens: streams and processes with the same seed merge exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from fasc_lightning.statistics._nystrom import NystromMoment, completed
from fasc_lightning.statistics._packed import packed_size
from fasc_lightning.statistics._second_moments import LowRankPlusDiagonal

#: Signs in a row of Omega (recommended by Tropp et al. 2019), if it has as many columns.
NONZEROS = 8
#: Held-out probe vectors.
PROBES = 8
#: Rows of the Gaussian sketch's dense random matrix that are made at a time.
BLOCK = 1024

#: Largest share of an exact moment's numbers at which a sketch is worth its error.
WORTHWHILE = 0.9

#: "range": the range finder of this module; "gaussian": the paper's projection with lifting, for comparison.
SketchKind = Literal["range", "gaussian"]
SKETCH_KINDS: tuple[SketchKind, ...] = ("range", "gaussian")


def _generator(seed: int, stream: int) -> torch.Generator:
    # Always on the CPU, so that a seed gives the same numbers on every device of the moments.
    return torch.Generator().manual_seed((seed * 1_000_003 + stream) % 2**63)


def sparse_signs(d: int, s: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return the positions and values of the signs of Omega (d, s).

    The columns are divided into as many strata as a row has signs, with one sign in each. Within a stratum every column
    gets equally many signs. So no column is empty, and no two signs coincide.

    Returns:
        Columns, int64, and values of +1 or -1, float32, both of shape (signs a row, d).
    """
    strata = min(NONZEROS, s)
    generator = _generator(seed, 0)
    columns = torch.empty(strata, d, dtype=torch.int64)
    for j in range(strata):
        start, stop = j * s // strata, (j + 1) * s // strata
        columns[j] = torch.randperm(d, generator=generator).remainder_(stop - start).add_(start)
    values = torch.randint(0, 2, (strata, d), generator=generator).mul_(2).sub_(1).float()
    return columns, values


def probe_signs(d: int, seed: int) -> Tensor:
    """Return Psi, random signs, shape (d, PROBES), float32; independent of Omega of the same seed."""
    return torch.randint(0, 2, (d, PROBES), generator=_generator(seed, 1)).mul_(2).sub_(1).float()


@lru_cache(maxsize=16)
def _omega_transposed(d: int, s: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return Omega^T (s, d), sparse; cached for the last few widths, since layers of one width share it."""
    columns, values = (part.to(device) for part in sparse_signs(d, s, seed))
    features = torch.arange(d, device=device).expand_as(columns)
    where = torch.stack([columns.flatten(), features.flatten()])
    # The indices are in range by construction; without the argument, torch warns that it does not check.
    return torch.sparse_coo_tensor(where, values.to(dtype).flatten(), (s, d), check_invariants=False).coalesce()


def apply_transposed(Z: Tensor, s: int, seed: int) -> Tensor:
    """Return Omega^T Z, shape (s, c), for Z of shape (d, c), without a dense Omega."""
    return _omega_transposed(len(Z), s, seed, Z.dtype, Z.device) @ Z


def add_range_(Y: Tensor, X: Tensor, s: int, seed: int, weight: float = 1.0) -> Tensor:
    """Add ``weight X^T (X [Omega, Psi])`` to a range sketch, in place.

    Args:
        Y: Shape (d, s + PROBES).
        X: Rows, shape (tokens, d), with the dtype of ``Y``.
        s: Columns of Omega.
        seed: Seed of Omega and Psi.
        weight: Factor of the product.

    Returns:
        ``Y``.
    """
    columns = X.T.contiguous()
    projected = torch.cat([apply_transposed(columns, s, seed), probe_signs(len(columns), seed).to(X).T @ columns])
    return Y.addmm_(columns, projected.T, alpha=weight)


def nystrom(Y: Tensor, diagonal: Tensor, seed: int, rank: int | None = None) -> Tensor:
    r"""Return F (d, r) with F F^T the rank-r Nystrom approximation of A, from Y = A Omega and the diagonal of A.

    A Omega (Omega^T A Omega)^+ (A Omega)^T lies below A (Tropp, Yurtsever, Udell and Cevher 2017, "Fixed-rank
    approximation of a positive-semidefinite matrix from streaming data", Algorithm 3). A is shifted by a little, so
    that the core has a Cholesky factor. The shift is subtracted from the eigenvalues at the end; eigenvalues below it
    become zero. Truncating afterwards, and not the core before, keeps the error near the optimum.

    There are three differences from the algorithm. It shifts by nu I, with nu relative to the norm of Y. Language
    models have features ten thousand times as large as the others; such a shift exceeds all other features together.
    Here every feature is shifted by nu times its own second moment: the algorithm runs on D^-1/2 A D^-1/2, D the
    diagonal, whose approximation is D^-1/2 times that of A times D^-1/2, since Omega absorbs the scales. In the same
    way, the columns of Y get one norm before Cholesky. nu is relative to the rounding of the summed Y, usually float32;
    an (s, s) core has about sqrt(s) times the rounding of one number. Last, eigenvalues of E^T E replace the singular
    values of E: in float64 this loses accuracy only far below nu, and is several times faster if d is much larger than
    s.

    Args:
        Y: Shape (d, s), float32 or float64.
        diagonal: Shape (d,).
        seed: Seed of Omega.
        rank: At most s; by default the rank that Y shows.

    Returns:
        F in float64. With a rank, F F^T is the best approximation of that rank of the result without one; its columns
            are
        orthogonal and ordered by length.
    """
    d, s = Y.shape
    nu = torch.finfo(Y.dtype).eps * s**0.5
    scale = diagonal.double().clamp(min=0).sqrt()
    scaled = Y.double() * _reciprocal(scale)[:, None]
    columns, values = (part.to(Y.device) for part in sparse_signs(d, s, seed))
    scaled.scatter_add_(1, columns.T, nu * scale[:, None] * values.T.double())
    core = apply_transposed(scaled * scale[:, None], s, seed)
    core = (core + core.T) / 2
    level = _reciprocal(core.diagonal().clamp(min=0).sqrt())
    core.mul_(level).mul_(level[:, None])
    scaled.mul_(level)
    L, info = torch.linalg.cholesky_ex(core)
    if info == 0:
        E = torch.linalg.solve_triangular(L.T, scaled, upper=True, left=False)
    else:  # rounding exceeds the shift, or Omega is rank deficient: directions that the core does not show are left out
        spectrum, Q = torch.linalg.eigh(core)
        shown = spectrum > nu
        E = scaled @ (Q[:, shown] / spectrum[shown].sqrt())
    del scaled, core
    squares, V = torch.linalg.eigh(E.T @ E)
    kept = squares > nu
    F = E @ (V[:, kept] * (1 - nu / squares[kept]).sqrt())
    F.mul_(scale[:, None])
    if rank is None:
        return F
    return F @ torch.linalg.eigh(F.T @ F)[1].flip(1)[:, :rank]


def _reciprocal(values: Tensor) -> Tensor:
    """Return 1 / values, with zero for zero."""
    return torch.where(values > 0, 1 / values, 0)


def add_gaussian_(core: Tensor, X: Tensor, seed: int, weight: float = 1.0) -> Tensor:
    """Add ``weight (X R)^T (X R)`` to the paper's projected moment, in place, with R of N(0, 1/s) entries.

    Args:
        core: Shape (s, s).
        X: Rows, shape (tokens, d), with the dtype of ``core``.
        seed: Seed of R.
        weight: Factor of the product.

    Returns:
        ``core``.
    """
    s = len(core)
    projected = torch.zeros(len(X), s, dtype=X.dtype, device=X.device)
    for start in range(0, X.shape[1], BLOCK):
        R = gaussian_rows(start, min(BLOCK, X.shape[1] - start), s, seed).to(X)
        projected.addmm_(X[:, start : start + BLOCK], R)
    return core.addmm_(projected.T, projected, alpha=weight)


def gaussian_rows(start: int, rows: int, s: int, seed: int) -> Tensor:
    """Return rows start ... start + rows of R (d, s), entries of N(0, 1/s), float32; start is a multiple of BLOCK."""
    return torch.randn(rows, s, generator=_generator(seed, 2 + start // BLOCK)) / s**0.5


def lift(core: Tensor, d: int, seed: int) -> Tensor:
    """Return F (d, s) in float64 with F F^T = R core R^T: the paper's way back to d dimensions (Appendix C, step 5).

    E[R R^T] = I, but the span of R is random, and the lifted moment lies in it whatever A is. So this is for comparison
    only.
    """
    values, Q = torch.linalg.eigh(core.double())
    root = Q * values.clamp(min=0).sqrt()
    s = len(core)
    return torch.cat(
        [gaussian_rows(start, min(BLOCK, d - start), s, seed).to(root) @ root for start in range(0, d, BLOCK)]
    )


@dataclass(frozen=True)
class Sketch:
    """Sketch of one second moment; its sums are one flat tensor, whose layout only this class knows.

    Attributes:
        features: d, the width of the moment.
        size: s, at most d - 1.
        seed: Seed of all random matrices. Only sums with the same seed merge.
        kind: "range" or "gaussian".

    Raises:
        ValueError: If the size is not in 1 ... d - 1, or the kind is unknown.
    """

    features: int
    size: int
    seed: int = 0
    kind: SketchKind = "range"

    def __post_init__(self) -> None:
        if not 1 <= self.size < self.features:
            raise ValueError(
                f"Expected a sketch size from 1 to {self.features - 1} for a moment of width {self.features} but got "
                f"{self.size}. Take the exact moment instead."
            )
        if self.kind not in SKETCH_KINDS:
            raise ValueError(
                f"Expected the kind of sketch to be one of {', '.join(SKETCH_KINDS)} but got {self.kind!r}."
            )

    @property
    def _shape(self) -> tuple[int, int]:
        return (self.features, self.size + PROBES) if self.kind == "range" else (self.size, self.size)

    @property
    def numbers(self) -> int:
        """The count of numbers in the sums."""
        return self._shape[0] * self._shape[1] + self.features

    @property
    def is_worthwhile(self) -> bool:
        """Whether the sketch is clearly smaller than the exact moment; at half the width it is not, nor faster."""
        return self.numbers <= WORTHWHILE * packed_size(self.features)

    def _views(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        return sums[: -self.features].view(self._shape), sums[-self.features :]

    def add_(self, sums: Tensor, X: Tensor, weight: float = 1.0) -> Tensor:
        """Add ``weight X^T X`` to the sums, in place.

        Args:
            sums: Shape (numbers,).
            X: Rows, shape (tokens, d), same dtype and device.
            weight: Factor of the product.

        Returns:
            ``sums``.
        """
        state, diagonal = self._views(sums)
        diagonal.add_(torch.linalg.vecdot(X, X, dim=0), alpha=weight)
        if self.kind == "range":
            add_range_(state, X, self.size, self.seed, weight)
        else:
            add_gaussian_(state, X, self.seed, weight)
        return sums

    def diagonal(self, sums: Tensor) -> Tensor:
        """Return the exact diagonal of the summed moment, shape (d,)."""
        return self._views(sums)[1]

    def second_moment(self, sums: Tensor) -> LowRankPlusDiagonal | NystromMoment:
        """Return the moment rebuilt from its sums, in float64, with an estimate of its error.

        The range finder's moment is completed (``statistics/_nystrom.py``) and has the exact diagonal. The Gaussian one
        is zero outside its span, as in the paper, and holds no probes, so its error is unknown.
        """
        state, diagonal = self._views(sums)
        if self.kind == "gaussian":
            return LowRankPlusDiagonal(lift(state, self.features, self.seed), torch.zeros_like(diagonal).double())
        factor = nystrom(state[:, : self.size], diagonal, self.seed)
        exact, found = diagonal.double().clamp(min=0), factor.square().sum(1)
        # F F^T is below A but for rounding, which can lift a large or nearly constant feature above its second moment.
        factor.mul_((exact * _reciprocal(found)).clamp(max=1).sqrt()[:, None])
        omega = _omega_transposed(self.features, self.size, self.seed, exact.dtype, exact.device).to_dense().T
        rebuilt = completed(factor, omega, exact)
        return replace(rebuilt, error=self._error(sums, rebuilt))

    def error(self, sums: Tensor) -> float:
        """Return the estimated error of the rebuilt moment (:meth:`second_moment`); NaN for kind "gaussian"."""
        return self.second_moment(sums).error

    def _error(self, sums: Tensor, S: NystromMoment) -> float:
        r"""Return an estimate of |A - S|_F / |A|_F, S the rebuilt moment, from the held-out probes; zero if S is zero.

        For random signs psi, E|M psi|^2 = |M|_F^2; with eight of them the estimate is good to about a third. The
        diagonal, which every sign vector would see whole, is zero in A - S. The norm of S stands for the norm of A,
        which the probes would estimate less well. S and the probes are independent, so the square of the estimate has
        no bias but the rounding of the sums.
        """
        norm = S.norm()
        if not norm > 0:
            return 0.0
        seen = self._views(sums)[0][:, self.size :].double()
        probes = probe_signs(self.features, self.seed).to(seen)
        return float((seen - S.apply(probes)).norm() / PROBES**0.5 / norm)
