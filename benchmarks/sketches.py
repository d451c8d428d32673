"""Memory and time of sketched and projected moments, beside whole ones.

    python benchmarks/sketches.py widths --output benchmarks/results
    python benchmarks/sketches.py block --output benchmarks/results
    python benchmarks/sketches.py tables --output benchmarks/results --write docs/scale.md

* widths: memory of one second moment and processor time to add tokens to it: whole, in sketches of a sixteenth to half
  of the width, and projected by a weight whose other side is a quarter as wide. They run in turn. Existing widths of
  the output are not measured again.
* block: one decoder block with Llama-3-8B's shapes and random weights is calibrated on activations of low rank and
  noise, and factorised, in a process of its own for each kind of moments. The results are the largest resident memory
  beside the prediction, and seconds by phase. Existing kinds of the output are not measured again.
* tables: both results as Markdown, in ``sketches.md`` and between the markers of a page.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from interleaved import interleave, speed_ups
from memory import resident, run_alone, warm_up
from pages import write_part
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from fasc_lightning import Calibration, FascCallback, compress
from fasc_lightning.cli import markdown_table, write_json
from fasc_lightning.compression import CompressionReport
from fasc_lightning.planning import fit_forecast
from fasc_lightning.statistics import Moments, Projection, Sketch, packed_size

#: The width over the columns of a sketch.
SHARES = (16, 8, 4, 2)
#: The width over the narrower side of a projected moment; in rows PROJECTED stands for a share.
NARROWER, PROJECTED = 4, 0
#: Tokens of one update, as in a batch of one window.
UPDATE = 512
#: The shapes of Llama-3-8B's block.
SHAPES = {"hidden": 4096, "inner": 14336, "heads": 32, "kv_heads": 8}
#: Kinds of its moments.
KINDS = ("whole", "projected", "range")
#: Number of classes of the loss in the block's calibration.
CLASSES = 256


def width_rows(d: int, seconds: float) -> list[dict[str, Any]]:
    """Return one row for the whole moment of a width, for the projected one and for each of its sketches.

    Args:
        d: The width.
        seconds: Time for measuring; a few rounds always run.
    """
    X = torch.randn(UPDATE, d, generator=torch.Generator().manual_seed(0))
    streams: dict[int, Any] = {share: Moments(d, sketch=Sketch(d, d // share)) for share in SHARES}
    streams |= {PROJECTED: Projected(d), 1: Moments(d)}
    actions = {share: partial(stream.update, X) for share, stream in streams.items()}
    times = interleave(actions, seconds, clock=time.process_time)
    faster = speed_ups(times, 1)
    return [
        {
            "width": d,
            "size": d // NARROWER if share == PROJECTED else d // share,
            "share": share,
            "bytes": stream.nbytes,
            "of_exact": stream.nbytes / streams[1].nbytes,
            "microseconds_per_token": 1e6 * sorted(times[share])[len(times[share]) // 2] / UPDATE,
            "times_as_fast": faster[share].to_dict(),
            "rounds": len(times[share]),
            "threads": torch.get_num_threads(),
        }
        for share, stream in streams.items()
    ]


class Projected:
    """The second moment of a width projected by a weight, products with the weight included.

    Args:
        d: The width.
    """

    def __init__(self, d: int) -> None:
        self.projection = Projection(d, d // NARROWER)
        self.weight = torch.randn(d, d // NARROWER, generator=torch.Generator().manual_seed(1))
        self.sums = torch.zeros(self.projection.numbers)
        self.nbytes = self.sums.nbytes

    def update(self, X: Tensor) -> None:
        """Add rows X (tokens, d)."""
        self.projection.add_(self.sums, X, 1.0, X @ self.weight)


class BlockModule(pl.LightningModule):
    """One Llama decoder block with a loss per token, whose class is given by a fixed projection of the output.

    Args:
        hidden: Width of the residual stream.
        inner: Width of the MLP.
        heads: Number of attention heads.
        kv_heads: Number of key-value heads.
    """

    def __init__(self, hidden: int, inner: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=inner,
            num_hidden_layers=1,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
        )
        config._attn_implementation = "sdpa"
        self.block = LlamaDecoderLayer(config, 0)
        self.rotary = LlamaRotaryEmbedding(config)
        self.projection: Tensor
        self.register_buffer("projection", torch.randn(hidden, CLASSES) / hidden**0.5)

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the mean loss of the tokens."""
        x = batch["states"]
        positions = torch.arange(x.shape[1], device=x.device)[None]
        output = self.block(x, position_embeddings=self.rotary(x, positions))
        scores = output @ self.projection
        return nn.functional.cross_entropy(scores.flatten(0, 1), batch["classes"].flatten())

    def loss_terms(self, batch: dict[str, Tensor]) -> int:
        """Return the number of token losses in the mean that is a batch's loss."""
        return batch["classes"].numel()

    def configure_optimizers(self) -> None:
        """Train nothing."""


def block_batches(hidden: int, tokens: int, window: int) -> list[dict[str, Tensor]]:
    """Return windows of activations: decaying directions in an eighth of the width, and noise of a tenth.

    Args:
        hidden: The width.
        tokens: Tokens of all windows.
        window: Tokens of each window.
    """
    generator = torch.Generator().manual_seed(0)
    rank = max(1, hidden // 8)
    scales = torch.arange(1, rank + 1) ** -0.5
    directions = torch.randn(rank, hidden, generator=generator) * scales[:, None]
    level = float(scales.norm())
    batches = []
    for _ in range(math.ceil(tokens / window)):
        z = torch.randn(1, window, rank, generator=generator)
        noise = torch.randn(1, window, hidden, generator=generator)
        classes = torch.randint(CLASSES, (1, window), generator=generator)
        batches.append({"states": z @ directions / level + 0.1 * noise, "classes": classes})
    return batches


def measure_block(options: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and factorise the block in this process, and return predicted and measured figures."""
    warm_up()
    before = resident()
    start = time.perf_counter()
    torch.manual_seed(0)
    shapes = {name: getattr(options, name) for name in SHAPES}
    module = BlockModule(**shapes)
    batches = block_batches(options.hidden, options.tokens, options.window)
    how: dict[str, Any] = {
        "keep": options.keep,
        "allocation": options.allocation,
        "refit": False,
        "sketch": None if options.kind == "whole" else options.kind,
        "sketch_size": options.sketch_size or "auto",
        "sketch_above": options.sketch_above,
    }
    frozen = FascCallback(**how, calibration=Calibration(update_weights=False))
    predicted = fit_forecast(module, frozen, options.window, options.tokens)
    made, after_making = time.perf_counter() - start, resident()
    report = compress(module, batches, **how, progress=False)
    assert isinstance(report, CompressionReport)
    return {
        **shapes,
        "tokens": len(batches) * options.window,
        "window": options.window,
        "keep": options.keep,
        "sketch_size": how["sketch_size"],
        "sketch_above": options.sketch_above,
        "threads": torch.get_num_threads(),
        "resident": {"before": before, "with the model and its batches": after_making, "peak": resident()},
        "batches_bytes": sum(t.numel() * t.element_size() for batch in batches for t in batch.values()),
        "predicted": {
            "peak": predicted.peak.device,
            "parts": predicted.parts,
            "seconds": None if predicted.seconds is None else vars(predicted.seconds),
        },
        "moments_bytes": report.moments_bytes,
        "exact_moments_bytes": 4
        * sum(packed_size(m) + packed_size(n) for m, n in (row.shape for row in report.layers)),
        "seconds": {"make": made, **report.seconds},
        "kept": report.kept,
        "layers": [
            {"name": r.name, "shape": r.shape, "rank": r.rank, "loss": r.loss, "sketches": r.sketches}
            for r in report.layers
        ],
    }


def table_widths(rows: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Return the printed rows of the widths."""
    shown: list[dict[str, object]] = []
    for row in sorted(rows, key=lambda r: (r["width"], r["share"] == 1, -r["share"])):
        exact, faster = row["share"] == 1, row["times_as_fast"]
        columns = f"projected to {row['size']}" if row["share"] == PROJECTED else f"{row['size']} (1/{row['share']})"
        shown.append(
            {
                "width": row["width"],
                "columns": "whole" if exact else columns,
                "MB": f"{row['bytes'] / 1e6:.1f}",
                "of whole": "" if exact else f"{row['of_exact']:.2f}",
                "μs a token": f"{row['microseconds_per_token']:.1f}",
                "times as fast": ""
                if exact
                else f"{faster['median']:.1f} ({faster['low']:.1f} to {faster['high']:.1f})",
            }
        )
    return shown


def table_block(rows: dict[str, dict[str, Any]]) -> list[dict[str, object]]:
    """Return the printed rows of the block, one column for each kind of moments."""
    shown: list[dict[str, object]] = []

    def line(what: str, values: list[str]) -> None:
        shown.append({"": what, **dict(zip(rows, values, strict=True))})

    def gibibytes(what: str, values: list[int]) -> None:
        line(what, [f"{value / 2**30:.2f} GiB" for value in values])

    found = list(rows.values())
    gibibytes("moments", [row["moments_bytes"] for row in found])
    gibibytes("peak resident memory", [row["resident"]["peak"] for row in found])
    gibibytes("of it the interpreter and its libraries", [row["resident"]["before"] for row in found])
    gibibytes("of it the batches", [row["batches_bytes"] for row in found])
    gibibytes("peak predicted, without both", [row["predicted"]["peak"] for row in found])
    # The forecast covers the model and its compression, without the interpreter and the batches.
    own = [row["resident"]["peak"] - row["resident"]["before"] - row["batches_bytes"] for row in found]
    ratios = [f"{mine / row['predicted']['peak']:.2f}" for mine, row in zip(own, found, strict=True)]
    line("measured over predicted", ratios)
    for phase in ("calibrate", "factorize"):
        line(f"seconds to {phase}", [f"{row['seconds'][phase]:.0f}" for row in found])
    errors = [[side["error"] for layer in row["layers"] for side in layer["sketches"].values()] for row in found]
    line("largest estimated error of a moment", [f"{max(some):.0%}" if some else "" for some in errors])
    losses = [sum(layer["loss"] for layer in row["layers"]) for row in found]
    line("what the solver thinks is lost, over that of whole moments", [f"{x / losses[0]:.3f}" for x in losses])
    return shown


def tables(found: dict[str, Any]) -> str:
    """Return all results as Markdown."""
    parts = []
    if found.get("widths"):
        parts += ["### Sketches beside exact moments", markdown_table(table_widths(found["widths"]))]
    if block := found.get("block"):
        first = next(iter(block.values()))
        shapes = f"{first['hidden']} and {first['inner']}"
        title = f"### One block of {shapes}, {first['tokens']:,} tokens, keep {first['keep']:g}"
        parts += [title, markdown_table(table_block(block))]
    return "\n\n".join(parts)


def main() -> None:
    """Run one part and save its results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("widths", "block", "tables"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder for sketches.json, .md")
    parser.add_argument("--write", type=Path, help="page whose generated part is replaced")
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--seconds", type=float, default=30, help="that measuring a width may take")
    for name, value in SHAPES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help="of the block")
    parser.add_argument("--tokens", type=int, default=8192, help="that the block is calibrated on")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--kind", choices=KINDS, help="measure the block's moments held so in this process")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--allocation", default="fisher")
    parser.add_argument("--sketch-size", type=int, default=3584, help='0 for "auto"')
    parser.add_argument("--sketch-above", type=int, default=4096)
    options = parser.parse_args()
    if options.kind is not None:  # in the measuring process, whose last line is the result
        print(json.dumps(measure_block(options)))
        return
    path = options.output / "sketches.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if options.part == "widths":
        rows = found.setdefault("widths", [])
        for width in options.widths:
            if width not in {row["width"] for row in rows}:
                rows += width_rows(width, options.seconds)
                write_json(found, path)
    elif options.part == "block":
        blocks = found.setdefault("block", {})
        for kind in KINDS:
            if kind not in blocks:
                blocks[kind] = run_alone(__file__, [*sys.argv[1:], "--kind", kind])
                write_json(found, path)
    text = tables(found)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "sketches.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if options.write is not None:
        write_part(options.write, "sketches.py", text)


if __name__ == "__main__":
    main()
