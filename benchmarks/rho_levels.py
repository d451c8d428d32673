"""Rates at which rho exceeds its null by chance, and at which its interval covers the truth, by shape of the batches.

    python benchmarks/rho_levels.py

Texts are synthetic: each is an autocorrelated series of tokens (AR(0.9)), independent of the other texts. In the first
table gradients are independent of the activations, so rho should exceed its null in 5 of 100 cases, and the debiased
value should be around 0. In the second table rho is 0.3, which the 95 % interval should cover in 95 of 100 cases.
``LayerScores`` samples the batches as in a fit; undefined values are counted separately.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fasc_lightning.batches import TokenRows
from fasc_lightning.cli import Row, save_table
from fasc_lightning.dependence import LayerScores

WIDTH, MEMORY, TOKENS = 8, 0.9, 512
#: Sequences per batch, and number of batches.
SHAPES = ((1, 1), (1, 8), (1, 16), (2, 8), (3, 8), (4, 1), (4, 8), (5, 1), (8, 1), (8, 4), (24, 1))


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the benchmark and return the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=400, help="observations of each shape")
    parser.add_argument("--length", type=int, default=512, help="tokens of a text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder for rho_levels.csv")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for sequences, batches in SHAPES:
        shape = sequences, batches, options.length
        chance = list(observe(*shape, 0.0, options.repeats, options.seed))
        coupled = list(observe(*shape, 0.3, options.repeats, options.seed + 1))
        rows.append({"sequences a batch": sequences, "batches": batches, **levels(chance), **coverage(coupled, 0.3)})
        print(", ".join(f"{key} {value:.3g}" for key, value in rows[-1].items()), flush=True)
    if options.output:
        save_table(rows, Path(options.output) / "rho_levels.csv")
    return rows


def observe(sequences: int, batches: int, length: int, rho: float, repeats: int, seed: int) -> Iterator[Row]:
    """Yield observations of one layer whose x and g have this rho.

    Args:
        sequences: Sequences of each batch.
        batches: Batches of an observation.
        length: Tokens of a sequence.
        rho: The true value.
        repeats: Number of observations.
        seed: Seed of the data.
    """
    generator = torch.Generator().manual_seed(seed)
    mix = coupling(rho, generator)
    layer = nn.Linear(WIDTH, WIDTH)
    for _ in range(repeats):
        scores = LayerScores({"layer": layer}, TOKENS, gradient="output")
        for _ in range(batches):
            x, noise = (series(sequences, length, generator) for _ in range(2))
            seeds = torch.randint(2**62, (sequences,), generator=generator).tolist()
            g = x @ mix + noise
            g[:, -1] = 0  # as of a text's last token
            rows = TokenRows(sample_seeds=seeds)
            scores("layer", x.flatten(0, 1), g.flatten(0, 1), rows, [length] * sequences)
        yield dict(scores.rows(0)[0])


def series(sequences: int, length: int, generator: torch.Generator) -> Tensor:
    """Return stationary AR(1) series of unit variance, shape (sequences, length, WIDTH)."""
    from scipy.signal import lfilter

    steps = torch.randn(sequences, length, WIDTH, generator=generator).double().numpy()
    steps[:, 1:] *= math.sqrt(1 - MEMORY**2)
    return torch.from_numpy(lfilter([1.0], [1.0, -MEMORY], steps, axis=1)).float()


def coupling(rho: float, generator: torch.Generator) -> Tensor:
    """Return M so that x and g = M^T x + e have this rho, for x and e of unit covariance."""
    direction = torch.randn(WIDTH, WIDTH, generator=generator).double()
    low, high = 0.0, 10.0
    for _ in range(60):
        middle = (low + high) / 2
        M = middle * direction
        own = torch.linalg.matrix_norm(M.T @ M + torch.eye(WIDTH))
        low, high = (middle, high) if M.norm() / math.sqrt(math.sqrt(WIDTH) * own) < rho else (low, middle)
    return (low * direction).float() if rho else torch.zeros(WIDTH, WIDTH)


def levels(rows: Sequence[Row]) -> Row:
    """Return the share above the null among rows with one, and the mean debiased value with its sign and square."""
    rho, null, debiased = (np.array([row[name] for row in rows]) for name in ("rho", "null", "debiased"))
    tested = np.isfinite(null)
    squares = np.sign(debiased) * debiased**2
    return {
        "null defined": tested.mean(),
        "above the null": (rho[tested] > null[tested]).mean() if tested.any() else math.nan,
        "debiased defined": np.isfinite(debiased).mean(),
        "root of the mean debiased square": float(np.sign(m := _mean(squares)) * abs(m) ** 0.5),
    }


def coverage(rows: Sequence[Row], truth: float) -> Row:
    """Return the share of the defined intervals that cover the truth."""
    low, high = (np.array([row[name] for row in rows]) for name in ("low", "high"))
    defined = np.isfinite(low) & np.isfinite(high)
    covered = (low[defined] <= truth) & (truth <= high[defined])
    return {
        "interval defined": defined.mean(),
        "covers 0.3": covered.mean() if defined.any() else math.nan,
        "median width": float(np.median((high - low)[defined])) if defined.any() else math.nan,
    }


def _mean(values: np.ndarray) -> float:
    found = values[np.isfinite(values)]
    return float(found.mean()) if found.size else math.nan


if __name__ == "__main__":
    main(sys.argv[1:])
