"""Sums over the weight gradients of whole sequences: the diagonal of their Fisher, and its Kronecker factors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fasc_lightning.statistics._accumulators import Accumulator, check_pairs
from fasc_lightning.statistics._packed import add_gram_, packed_diagonal, packed_size, unpack


class SequenceFisher(Accumulator):
    r"""Sums over the weight gradients of single sequences, G_i = \sum_t h_t x_t^T of shape (m, n), none of them stored.

    The empirical Fisher of a layer's weight is F = E[vec(G_i) vec(G_i)^T]. Its diagonal, summed along the rows of W,
    is what FWSVD weighs by. Its nearest Kronecker product, F ~ right (x) left, is the dominant singular pair of
    E[vec(G_i) vec(G_i)^T] rearranged (Van Loan and Pitsianis 1993), and one step of the power iteration for it is

        left <- E[G_i right G_i^T],    right <- E[G_i^T left G_i].

    Both sides step at once, from the same factors: a pass over the data each. It starts from identities.

    A call whose sequences cannot be told apart counts as one sequence, and so do samples of one token each: see
    :meth:`~fasc_lightning.batches.TokenRows.lengths`.

    Args:
        m: Outputs.
        n: Inputs.
        dtype: Type of the accumulators.
        kronecker: Whether to take a step of the iteration, or only the diagonal's row sums.
        start: Stream of the step before, whose factors this one starts from; identities by default. Its matrices are
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
        """Add sequences of pairs (x, scale * h); those of no tokens do not count.

        Args:
            x: Shape (tokens, n), sequence after sequence.
            h: Shape (tokens, m).
            lengths: Tokens of each sequence.
            scale: Factor of every h.

        Raises:
            ValueError: If the shapes are others, or the lengths do not add up to the tokens.
        """
        m, n = self.shape
        check_pairs(x, h, (n, m))
        if sum(lengths) != len(x):
            raise ValueError(
                f"Expected sequences of {len(x)} tokens in all but got lengths that sum to {sum(lengths)}."
            )
        self.allocate()
        with torch.autocast(x.device.type, enabled=False):
            # Unpacked for the length of a call only: for all layers they would be half as much memory again.
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
        """Return the row sums of E[G_i * G_i], elementwise squares, shape (m,)."""
        return self.average("rows")

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return (right (n, n), left (m, m)) after the step.

        Each has the trace sqrt(tr F) with tr F = E|G_i|_F^2, so that right (x) left has the trace of F. The power
        iteration itself leaves the scale open; this one makes layers compare, and is exact where F is a Kronecker
        product.

        Raises:
            ValueError: If this stream takes no step.
        """
        if not self.is_kronecker:
            raise ValueError("Expected a stream of Kronecker factors but it was made with kronecker=False.")
        self.allocate()
        m, n = self.shape
        trace = self.fisher_rows().sum().sqrt()
        return _unit(self.right, n).mul_(trace / n), _unit(self.left, m).mul_(trace / m)


def _unit(packed: Tensor, d: int) -> Tensor:
    """Return the positive semidefinite matrix (d, d) at the scale of an identity, trace d; zeros stay zeros."""
    trace = packed_diagonal(packed, d).sum()
    S = unpack(packed, d)
    return S.mul_(d / trace) if trace > 0 else S
