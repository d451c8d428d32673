"""The Fisher of whole sequences: the row sums of its diagonal, and its Kronecker factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fasc_lightning.statistics._accumulators import Accumulator, check_pairs
from fasc_lightning.statistics._packed import add_gram_, packed_diagonal, packed_size, unpack


class SequenceFisher(Accumulator):
    r"""Sums over the weight gradients of single sequences, dW = \sum_t h_t x_t^T of shape (m, n); no dW is stored.

    The empirical Fisher of a layer's weight is F = E[vec(dW) vec(dW)^T]. FWSVD weighs by its diagonal, summed along the
    rows of W. The Kronecker product A (x) G nearest to F is the dominant singular pair of E[vec(dW) vec(dW)^T]
    rearranged (Van Loan and Pitsianis 1993). One step of its power iteration is

        G <- E[dW A dW^T],    A <- E[dW^T G dW].

    Both factors step at once, from the same factors, once a pass over the data. They start from identities.

    A call whose sequences are unknown counts as one sequence, and so do samples of one token each: see
    :meth:`~fasc_lightning.batches.TokenRows.lengths`.

    Files hold the sums of A as ``right`` and the sums of G as ``left``.

    Args:
        m: Outputs.
        n: Inputs.
        dtype: Dtype of the sums.
        kronecker: Whether to make a step of the iteration, or only sum the rows of the diagonal.
        start: Stream of the step before, from whose factors this one starts; identities by default. Its matrices are
            referred to, not copied.
    """

    rows: Tensor
    right: Tensor
    left: Tensor

    def __init__(
        self,
        m: int,
        n: int,
        dtype: torch.dtype = torch.float32,
        kronecker: bool = False,
        start: SequenceFisher | None = None,
    ) -> None:
        shapes: dict[str, tuple[int, ...]] = {"rows": (m,)}
        if kronecker:
            shapes |= {"right": (packed_size(n),), "left": (packed_size(m),)}
        super().__init__(dtype, shapes)
        self.shape = (m, n)
        self.is_kronecker = kronecker
        self.start = None if start is None else (start.right, start.left)

    def update(self, x: Tensor, h: Tensor, lengths: Sequence[int], scale: float = 1.0) -> None:
        """Add sequences of pairs (x, scale * h); sequences without tokens do not count.

        Args:
            x: Shape (tokens, n), sequence after sequence.
            h: Shape (tokens, m).
            lengths: Tokens of each sequence.
            scale: Factor of every h.

        Raises:
            ValueError: If a shape is wrong, or the lengths do not add up to the tokens.
        """
        m, n = self.shape
        check_pairs(x, h, (n, m))
        if sum(lengths) != len(x):
            raise ValueError(
                f"Expected sequences of {len(x)} tokens in all but got lengths that sum to {sum(lengths)}."
            )
        self.allocate()
        with torch.autocast(x.device.type, enabled=False):
            # Unpacked for one call only: for all layers the matrices would take half as much memory again.
            A = None if self.start is None else _unit(self.start[0], n)
            G = None if self.start is None else _unit(self.start[1], m)
            for dW in self._weight_gradients(x.detach(), h.detach(), lengths):
                self.rows.add_(dW.square().sum(1), alpha=scale**2)
                if self.is_kronecker:
                    add_gram_(self.left, dW.T, scale**2, None if A is None else A @ dW.T)
                    add_gram_(self.right, dW, scale**2, None if G is None else G @ dW)
                self.count += 1

    def _weight_gradients(self, x: Tensor, h: Tensor, lengths: Sequence[int]) -> Iterator[Tensor]:
        start = 0
        for length in lengths:
            rows = slice(start, start + length)
            start += length
            if length:
                yield h[rows].to(self.accumulator_dtype).T @ x[rows].to(self.accumulator_dtype)

    def fisher_rows(self) -> Tensor:
        """Return the row sums of E[dW * dW], elementwise squares, shape (m,)."""
        return self.average("rows")

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return A (n, n) and G (m, m) after the step.

        Each has the trace sqrt(tr F) with tr F = E|dW|_F^2, so A (x) G has the trace of F. The power iteration leaves
        the scale open. This scale makes layers comparable, and is exact if F is a Kronecker product.

        Raises:
            ValueError: If this stream makes no step.
        """
        if not self.is_kronecker:
            raise ValueError("Expected a stream of Kronecker factors but it was made with kronecker=False.")
        self.allocate()
        m, n = self.shape
        trace = self.fisher_rows().sum().sqrt()
        return _unit(self.right, n).mul_(trace / n), _unit(self.left, m).mul_(trace / m)


def _unit(packed: Tensor, d: int) -> Tensor:
    """Return the positive semidefinite matrix (d, d) scaled to the trace d of an identity; zeros stay zeros."""
    trace = packed_diagonal(packed, d).sum()
    S = unpack(packed, d)
    return S.mul_(d / trace) if trace > 0 else S
