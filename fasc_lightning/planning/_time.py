"""Estimated time of a compression, from the speed that a short probe measures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch

from fasc_lightning.solvers import two_sided
from fasc_lightning.statistics import LayerSketches, Projection, Reduction, add_gram_, packed_size

#: Sides of the probes' matrices: large enough for full speed, small enough for a tenth of a second.
WIDTH, TOKENS, SOLVED = 1024, 512, 384


@dataclass(frozen=True)
class Rates:
    """Floating-point operations per second.

    Attributes:
        products: Rate of a linear layer, in the model's dtype.
        grams: Rate of sums of outer products.
        solving: Rate of a solver, as :func:`solver_work` counts.
    """

    products: float
    grams: float
    solving: float


@dataclass(frozen=True)
class Seconds:
    """Estimated seconds.

    Attributes:
        per_1000_tokens: Seconds of calibration per 1,000 tokens, all passes together.
        factorize: Seconds to factorise all layers.
        calibrate: Seconds of calibration on the given number of tokens; None without a number.
    """

    per_1000_tokens: float
    factorize: float
    calibrate: float | None = None


def model_work(m: int, n: int) -> int:
    """Return the operations per token of a linear layer: 2 m n forward, and as many back to its input."""
    return 4 * m * n


def moments_work(
    m: int, n: int, copies: int = 1, sketches: LayerSketches | None = None, output_share: float = 1.0
) -> float:
    """Return the operations per token of a layer's moments.

    An exact side takes two operations per number of its packed matrix. For a sketch of s columns, X^T (X Omega) takes
    2 d s operations, and X Omega next to none, because Omega is sparse. A projected side takes 2 d s operations for its
    product with W, then two per number of a packed matrix of its s columns.

    Args:
        m: Outputs.
        n: Inputs.
        copies: Number of kinds of second moments ("plain" and "coupled").
        sketches: Sketches of the two sides.
        output_share: Share of the tokens that enter G.
    """
    sides = sketches or LayerSketches()

    def side(d: int, sketch: Reduction | None) -> int:
        if sketch is None:
            return 2 * packed_size(d)
        return 2 * d * sketch.size + (2 * packed_size(sketch.size) if isinstance(sketch, Projection) else 0)

    return copies * (output_share * side(m, sides.outputs) + side(n, sides.inputs))


def solver_work(m: int, n: int) -> int:
    """Return the operations of :func:`~fasc_lightning.solvers.two_sided`; its eigendecomposition counts as 10 r^3.

    With r = min(m, n) and w = max(m, n), W A takes 2 r w^2, W A W^T and the factor on W's side take 2 r^2 w each, and
    the rest is of order r^3.
    """
    r, w = min(m, n), max(m, n)
    return 2 * r * w * w + 4 * r * r * w + 14 * r**3


def estimate(model: float, moments: float, solving: float, rates: Rates, passes: int = 1, tokens: int = 0) -> Seconds:
    """Return seconds from operations.

    Args:
        model: Operations per token of the model, forward and backward.
        moments: Operations per token of the moments; each pass gathers a share of them.
        solving: Operations of all factorisations.
        rates: Operations per second.
        passes: Number of passes over the data.
        tokens: Tokens of the calibration; 0 if unknown.
    """
    per_token = passes * model / rates.products + moments / rates.grams
    return Seconds(1000 * per_token, solving / rates.solving, tokens * per_token if tokens else None)


@cache
def probe(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure a device's rates for a moment, once per process.

    Args:
        device: A device of this machine.
        dtype: Dtype of the model.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    X, W = noise(TOKENS, WIDTH).to(device), noise(WIDTH, WIDTH).to(device, dtype)
    x, packed = X.to(dtype), torch.zeros(packed_size(WIDTH), device=device)
    V, S = noise(SOLVED, SOLVED).to(device), (noise(SOLVED, 2 * SOLVED) / SOLVED).to(device)
    A = S @ S.T
    return Rates(
        products=2 * TOKENS * WIDTH * WIDTH / _fastest(lambda: x @ W.T, device),
        grams=2 * TOKENS * packed_size(WIDTH) / _fastest(lambda: add_gram_(packed, X), device),
        solving=solver_work(SOLVED, SOLVED) / _fastest(lambda: two_sided(V, A, A), device),
    )


def _fastest(run: Callable[[], object], device: torch.device, times: Iterable[int] = range(3)) -> float:
    """Return the least seconds of a few runs, because other work of the machine only adds time."""
    seconds = []
    for _ in times:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return max(min(seconds), 1e-9)
