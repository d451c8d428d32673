"""How long a compression will take, by the speed that a short probe finds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import torch

from fasc_lightning.solvers import two_sided
from fasc_lightning.statistics import LayerSketches, Projection, Reduction, add_gram_, packed_size

#: Sides of the probes' matrices: large enough to run at full speed, small enough to be done in a tenth of a second.
WIDTH, TOKENS, SOLVED = 1024, 512, 384


@dataclass(frozen=True)
class Rates:
    """Floating-point operations a second.

    Attributes:
        products: Of a linear layer, in the model's dtype.
        grams: Of sums of outer products.
        solving: Of :func:`solver_work`.
    """

    products: float
    grams: float
    solving: float


@dataclass(frozen=True)
class Seconds:
    """Estimated seconds.

    Attributes:
        per_1000_tokens: Of calibration, all passes together.
        factorize: All layers.
        calibrate: As many tokens as were named; None if none were.
    """

    per_1000_tokens: float
    factorize: float
    calibrate: float | None = None


def model_work(m: int, n: int) -> int:
    """Operations of a token in a linear layer: 2 m n forward, and as many back to its input."""
    return 4 * m * n


def moments_work(m: int, n: int, copies: int = 1, sketches: LayerSketches | None = None) -> int:
    """Operations of a token in a layer's moments.

    Args:
        m: Outputs.
        n: Inputs.
        copies: How many kinds of second moments there are, "plain" and "coupled".
        sketches: Of s columns: X^T (X Omega) is 2 d s operations, X Omega next to nothing, since Omega is sparse. An
            exact side takes twice what a packed matrix holds; a projected one that of its s columns, once W X is there.
    """
    sides = sketches or LayerSketches()

    def side(d: int, sketch: Reduction | None) -> int:
        if sketch is None:
            return 2 * packed_size(d)
        return 2 * d * sketch.size + (2 * packed_size(sketch.size) if isinstance(sketch, Projection) else 0)

    return copies * (side(m, sides.outputs) + side(n, sides.inputs))


def solver_work(m: int, n: int) -> int:
    """Operations of :func:`~fasc_lightning.solvers.two_sided`, its eigendecomposition as ten cubes.

    With r = min(m, n) and w = max(m, n): W A is 2 r w^2, W A W^T and the factor on W's side 2 r^2 w each, the rest of
    the order of r^3.
    """
    r, w = min(m, n), max(m, n)
    return 2 * r * w * w + 4 * r * r * w + 14 * r**3


def estimate(model: float, moments: float, solving: float, rates: Rates, passes: int = 1, tokens: int = 0) -> Seconds:
    """Return seconds from operations.

    Args:
        model: Operations a token of the model, forward and back.
        moments: Operations a token of the moments; each pass makes a share of them.
        solving: Operations of all factorisations.
        rates: Operations a second.
        passes: How often the model runs.
        tokens: Of the calibration; 0 if that is not known.
    """
    per_token = passes * model / rates.products + moments / rates.grams
    return Seconds(1000 * per_token, solving / rates.solving, tokens * per_token if tokens else None)


@cache
def probe(device: torch.device, dtype: torch.dtype) -> Rates:
    """Measure a device for a moment, once a process.

    Args:
        device: One that is there.
        dtype: Of the model.
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
    """Return the least seconds of a few runs: what else the machine does only ever adds to them."""
    seconds = []
    for _ in times:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return max(min(seconds), 1e-9)
