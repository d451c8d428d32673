"""The rank below which a compressed linear layer is faster than a dense one: the table of ``layout="auto"``.

    python benchmarks/break_even.py --output benchmarks/results          # measures, prints, saves
    python benchmarks/break_even.py --output benchmarks/results --write  # and puts the table into the package

The benchmark takes single layers with the shapes of SmolLM2-135M, Llama-3.2-1B and Llama-3-8B, in both layouts, float32
and bfloat16. It times prefilling 512 tokens and decoding one, in turn with dense layers of the same shape. Each variant
has as many copies of the layer as fill 64 MB, so that decoding reads weights from memory, as in a model. Each shape is
saved when it ends and not measured again under the same settings (delete the folder after a change of the code).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from inference_models import KINDS, random_layer
from interleaved import interleave, speed_ups
from torch import Tensor, nn

from fasc_lightning.cli import Row, library_versions, markdown_table, save_table, write_json
from fasc_lightning.layers import BREAK_EVEN, CompressedLinear

#: (m, n) of q and o, k and v, gate and up, down.
SHAPES = (
    *((576, 576), (192, 576), (1536, 576), (576, 1536)),
    *((2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)),
    *((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOKENS = (1, 512)
DENSE = ("dense", 1.0)
KEEPS = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)
#: Bytes of weights of a timed variant: more than the caches of a core hold.
BYTES = 64e6


def rank_for(m: int, n: int, keep: float, kind: type[CompressedLinear]) -> int:
    """Return the highest rank that keeps at most a share of the parameters; at least 1."""
    return max((k for k in range(1, min(m, n)) if kind.cost(m, n, k) <= keep * m * n), default=1)


def copies(make: Callable[[], nn.Module]) -> list[nn.Module]:
    """Return as many layers as fill the memory of a variant."""
    first = make()
    size = sum(p.numel() * p.element_size() for p in first.parameters())
    return [first, *(make() for _ in range(max(0, round(BYTES / size) - 1)))]


def run_all(layers: Sequence[nn.Module], x: Tensor) -> None:
    """Pass the same input through every layer."""
    for layer in layers:
        layer(x)


def make_variants(m: int, n: int, dtype: torch.dtype) -> dict[tuple[str, float], list[nn.Module]]:
    """Return copies of the dense layer and of every compressed one, by layout and share of the parameters kept."""
    variants = {DENSE: copies(partial(nn.Linear, n, m, bias=False, dtype=dtype))}
    for layout, kind in KINDS.items():
        for keep in KEEPS:
            k = rank_for(m, n, keep, kind)
            variants[layout, kind.cost(m, n, k) / (m * n)] = copies(partial(random_layer, layout, m, n, k, dtype))
    return variants


@torch.inference_mode()
def measure(m: int, n: int, dtype: str, seconds: float) -> list[Row]:
    """Return the rows of one shape: the time of a layer over that of the dense one, median over the rounds."""
    variants = make_variants(m, n, DTYPES[dtype])
    rows: list[Row] = []
    for tokens in TOKENS:
        x = torch.randn(tokens, n).to(DTYPES[dtype])
        # With many tokens, computing takes longer than reading weights, so one layer of each kind is enough.
        used = {key: layers[: None if tokens == 1 else 1] for key, layers in variants.items()}
        times = interleave({key: partial(run_all, layers, x) for key, layers in used.items()}, seconds)
        found = speed_ups({key: [t / len(used[key]) for t in values] for key, values in times.items()}, DENSE)
        for key, speed_up in found.items():
            if key != DENSE:
                row: Row = {"dtype": dtype, "layout": key[0], "m": m, "n": n, "tokens": tokens}
                row |= {"kept": round(key[1], 4), "time": round(1 / speed_up.median, 4)}
                rows.append({**row, "threads": torch.get_num_threads()})
    return rows


def break_even_table(rows: Sequence[Row]) -> list[Row]:
    """Return the highest share of the parameters at which each layout is as fast as a dense layer, by shape."""
    table: list[Row] = []
    keys = dict.fromkeys((row["dtype"], row["m"], row["n"]) for row in rows)
    for dtype, m, n in keys:
        line: Row = {"dtype": dtype, "m x n": f"{m} x {n}"}
        for layout in KINDS:
            for tokens in TOKENS:
                curve = [r for r in rows if (r["dtype"], r["m"], r["n"]) == (dtype, m, n)]
                curve = [r for r in curve if (r["layout"], r["tokens"]) == (layout, tokens)]
                line[f"{layout}, {tokens} token{'s' * (tokens > 1)}"] = shown(crossing(curve))
        table.append(line)
    return table


def crossing(curve: Sequence[Row]) -> float:
    """Return the highest share kept at which the time, linear between points, equals a dense layer's; 0 if never."""
    points = sorted((row["kept"], row["time"]) for row in curve)
    if points[-1][1] <= 1:
        return points[-1][0]
    for (x0, t0), (x1, t1) in reversed(list(pairwise(points))):
        if t0 <= 1 < t1:
            return x0 + (x1 - x0) * (1 - t0) / (t1 - t0)
    return 0.0


def shown(kept: float) -> str:
    """Return a share as text."""
    return "never" if kept == 0 else f"{kept:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the missing shapes, print the table, and save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--seconds", type=float, default=5.0, help="of each shape, dtype and number of tokens")
    parser.add_argument("--shapes", type=int, nargs="+", help="m n m n ..., in place of all")
    parser.add_argument("--write", action="store_true", help="replace the package's table")
    options = parser.parse_args(arguments)
    if options.write and options.shapes:
        parser.error("expected all shapes with --write, but got --shapes: the package's table would lose the others")
    flat: list[int] = options.shapes or [size for shape in SHAPES for size in shape]
    settings = {"threads": torch.get_num_threads(), "seconds": options.seconds, "versions": library_versions()}
    rows: list[Row] = []
    for dtype in DTYPES:
        for m, n in zip(flat[::2], flat[1::2], strict=True):
            path: Path = options.output / "break_even" / f"{dtype}-{m}x{n}.json"
            cell: Any = json.loads(path.read_text()) if path.exists() else {}
            if cell.get("settings") != settings:
                cell = {"settings": settings, "rows": measure(m, n, dtype, options.seconds)}
                write_json(cell, path)
            rows += cell["rows"]
    save_table(rows, options.output / "break_even.csv")
    if options.write:
        save_table(rows, BREAK_EVEN)
    print(
        f"Share of the parameters up to which a layer is as fast as a dense one ({torch.get_num_threads()} threads):\n"
    )
    print(markdown_table(break_even_table(rows)))


if __name__ == "__main__":
    main()
