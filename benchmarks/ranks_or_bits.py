"""Ranks, low-rank residuals of rounded matrices, and bits under one budget of bytes: J of every option of each layer.

    FASC_DATA=<folder with the texts> python benchmarks/ranks_or_bits.py --write docs/bytes.md

Each layer may be rounded to 2, 3, 4 or 8 bits in groups of 64; have a rank, in factors of 8 bits that lose nothing more
by their rounding; or have 2 or 3 bits and a residual of low rank in such factors. The residual minimises J of the error
of rounding (the two-sided form of QERA and EoRA). The matrix is then rounded again without it, and the better of both
is taken. One budget of bytes is spent over the options of all layers, with and without ranks and residuals, by J of the
moments. Twenty minutes for a third of SmolLM2-135M's blocks, once their moments are there; results are saved layer by
layer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from p1 import CALIBRATION
from pages import write_part
from torch import Tensor

from fasc_lightning.cli import Row, markdown_table, terminal_progress, write_json
from fasc_lightning.compression import StorageOptions, fisher_metric, spend
from fasc_lightning.data import calibration_windows, load_model
from fasc_lightning.layers import Grid, factors_cost, linear_weight, pivot_cost, select_layers
from fasc_lightning.rounding import ColumnMetric, round_matrix
from fasc_lightning.solvers import two_sided
from fasc_lightning.statistics import LayerMoments, dense
from fasc_lightning.studies.comparison import GatheredStatistics

BITS = (2, 3, 4, 8)
GROUP = 64
#: Bits that may have a residual, and its ranks.
RESIDUALS = {2: (8, 16, 32, 64), 3: (8, 16, 32, 64)}
#: Every rank of two factors, and of the ideal pivot layout, whose rounding is taken to lose nothing.
LAYOUTS = {"factors": factors_cost, "pivots": pivot_cost}
STEP = 8
BUDGETS = (0.27, 0.24, 0.21, 0.18, 0.15)

#: What a budget may be spent on, by the kinds of options. Bits alone are the control.
CHOICES = {
    "bits": ("bits",),
    "bits or factors": ("bits", "factors"),
    "bits or pivots": ("bits", "pivots"),
    "bits, with or without a residual": ("bits", "residual"),
}


def factor_bytes(numbers: int, m: int, k: int) -> int:
    """Return the bytes of two matrices of 8 bits with m and k outputs, each with a scale of 16 bits."""
    return numbers + 2 * (m + k)


@torch.no_grad()
def options_of(W: Tensor, moments: LayerMoments) -> list[tuple[str, int, float]]:
    """Return (kind, bytes, J) of every option of a layer."""
    m, n = W.shape
    A, G = (dense(moment).float() for moment in fisher_metric(moments))
    metric, found = ColumnMetric.of(A), []
    for bits in BITS:
        grid = Grid(bits, GROUP, symmetric=False)
        rounded = round_matrix(W, metric, grid).dequantize()
        rest = two_sided(W - rounded, A, G)
        found.append(("bits", grid.nbytes(m, n), float(rest.losses[0])))
        for rank in RESIDUALS.get(bits, ()):
            low = (rest.left[:, :rank] @ rest.right[:rank]).float()
            again = two_sided(W - round_matrix(W - low, metric, grid).dequantize(), A, G)
            loss = min(float(rest.losses[rank]), float(again.losses[rank]))
            found.append(("residual", grid.nbytes(m, n) + factor_bytes(rank * (m + n), m, rank), loss))
    losses = two_sided(W, A, G).losses
    for layout, cost in LAYOUTS.items():
        ranks = range(STEP, min(m, n), STEP)
        found += [(layout, factor_bytes(cost(m, n, k), m, k), float(losses[k])) for k in ranks]
    return found


def spent(layers: Mapping[str, Sequence[tuple[str, int, float]]], kinds: Sequence[str], budget: int) -> Row:
    """Return J and the bytes of all layers, and how many chose each kind, under one budget."""
    allowed = [sorted((o for o in options if o[0] in kinds), key=lambda o: o[1]) for options in layers.values()]
    ways = [StorageOptions(np.array([o[1] for o in os]), np.array([o[2] for o in os])) for os in allowed]
    chosen = [os[i] for os, i in zip(allowed, spend(ways, budget), strict=True)]
    counts = Counter(kind for kind, _, _ in chosen)
    return {"J": sum(o[2] for o in chosen), "bytes": sum(o[1] for o in chosen), "layers": dict(counts)}


def table(layers: Mapping[str, Sequence[tuple[str, int, float]]], dense_bytes: int) -> str:
    """Return a row for each budget and a column for each choice of options: J, and the change against bits alone."""
    rows: list[Row] = []
    for share in BUDGETS:
        row: Row = {"size": f"{share:g}"}
        control = 0.0
        for name, kinds in CHOICES.items():
            result = spent(layers, kinds, int(share * dense_bytes))
            control = control or result["J"]
            others = sum(count for kind, count in result["layers"].items() if kind != "bits")
            ratio = "" if name == "bits" else f" ({result['J'] / control - 1:+.1%}, {others} layers)"
            row[name] = f"{result['J']:.4f}{ratio}"
        rows.append(row)
    return markdown_table(rows)


def measured(options: argparse.Namespace) -> tuple[dict[str, list[tuple[str, int, float]]], int]:
    """Return the options of each layer, kept ones or new ones, and the layers' bytes in 16 bits."""
    model, tokenizer = load_model(options.model)
    model.eval().requires_grad_(False)
    layers = select_layers(model)
    windows = calibration_windows(options.texts, tokenizer, windows=options.windows, window=options.window, seed=0)
    folder = options.statistics or options.output / "statistics"
    statistics = GatheredStatistics(model, tokenizer, layers, windows, folder)
    path = options.output / f"{statistics.source}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    names = [name for i, name in enumerate(layers) if i // options.block % options.every == options.every // 2]
    moments = statistics.moments(["fasc"]) if set(names) - set(found) else None
    for name in terminal_progress(names, "Options"):
        if name not in found:
            assert moments is not None
            found[name] = options_of(linear_weight(layers[name]).detach().float(), moments.layer(name))
            write_json(found, path)
    size = sum(2 * linear_weight(layers[name]).numel() for name in names)
    return {name: [tuple(option) for option in found[name]] for name in names}, size


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the options, print the table, and write it into a page if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2")
    add("--texts", nargs="+", help="calibration texts; P1's, in FASC_DATA, without")
    add("--windows", type=int, default=64)
    add("--window", type=int, default=512)
    add("--every", type=int, default=3, help="one block in so many")
    add("--block", type=int, default=7, help="layers of a block")
    add("--statistics", type=Path, help="folder of kept moments")
    add("--output", type=Path, default=Path("benchmarks/results/ranks_or_bits"))
    add("--write", type=Path, help="page whose generated part is replaced")
    options = parser.parse_args(arguments)
    if options.texts is None:
        if (folder := os.environ.get("FASC_DATA")) is None:
            sys.exit("Expected --texts, or FASC_DATA to name the folder that holds P1's texts, but got neither.")
        options.texts = [str(Path(folder) / file) for file in CALIBRATION]
    options.output.mkdir(parents=True, exist_ok=True)
    found = table(*measured(options))
    print(found)
    if options.write is not None:
        write_part(options.write, "ranks_or_bits.py", found)


if __name__ == "__main__":
    main()
