"""Tokens per second and peak memory of compressed decoders against dense ones, in one run.

    python benchmarks/inference.py --output benchmarks/results/inference
    python benchmarks/inference.py --output out --compressed FOLDER    # a folder that save_pretrained wrote instead

The workloads are prefilling 512 tokens and decoding at batch 1 and 16, in float32, bfloat16 and int8, with layouts
pivot and factors at several budgets. "bits" are layers of full rank with 4 and 8 bits, prepared for decoding, beside
dense ones in bfloat16. The models are all 30 decoder layers of SmolLM2-135M (and their linear layers
alone), and one block with the shapes of Llama-3.2-1B and 3B and of Llama-3-8B, which Mistral-7B shares. Weights are
random, because times depend on shapes alone, and every layer keeps the same share, so that layouts are compared at
equal parameters. (A compressed model keeps different shares in different layers: give its folder.) Variants run in
turn. Each ratio is to the dense model of the same round, and is stated as the median over the rounds with the middle
half of them. With --compile each decoder also runs by torch.compile (a C++ compiler and minutes for each graph); the
ratio of the compiled dense model is to the eager one, and the others' to the compiled dense model.

Each cell (a shape, a dtype, a workload) is saved when it ends, and not measured again under the same settings (delete
the folder after a change of the code). The benchmark writes results.csv, results.md and speed_ups.png.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from inference_models import (
    KINDS,
    SHAPES,
    Workload,
    compiled_action,
    compressed_twin,
    decoder_action,
    growth,
    layers_action,
    linear_layers,
    load_pair,
    rounded_twin,
    weight_bytes,
)
from inference_tables import markdown, result_rows, speed_up_figure
from interleaved import Spread, interleave, speed_ups
from torch import nn

from fasc_lightning.cli import library_versions, save_table, whole_file, write_json
from fasc_lightning.layers import INT8_ROWS, QUANTIZATIONS, Grid, layer_sizes
from fasc_lightning.models import quantize

#: Dtypes of activations; the int8 kinds come from :func:`fasc_lightning.quantize` and are compared with dense int8.
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.float32,
    "int8-dynamic": torch.float32,
    "bits": torch.bfloat16,
}
#: The grids of "bits".
GRIDS = {"int4": Grid(4, 64, symmetric=False), "int8": INT8_ROWS}
KEEPS = (0.8, 0.6, 0.4)
DENSE = "dense"
#: End of the first word of the names of compiled variants.
COMPILED = "-compiled"

#: The timed part of a model: the whole decoder, or its linear layers alone.
PARTS: dict[str, Callable[[Any, Workload], Callable[[], Any]]] = {
    "decoder": decoder_action,
    "linear layers": layers_action,
}


def workloads(window: int, past: int) -> dict[str, Workload]:
    """Return the workloads by name."""
    return {
        f"prefill {window}": Workload(1, window, 0),
        "decode, batch 1": Workload(1, 1, past),
        "decode, batch 16": Workload(16, 1, past),
    }


def quantised(model: nn.Module, dtype: str) -> nn.Module:
    """Return the model, in int8 if asked for."""
    for quantization in QUANTIZATIONS:
        if dtype == quantization:
            quantize(model, quantization)
    return model


def make_variants(shape: str, dtype: str, options: argparse.Namespace) -> dict[str, nn.Module]:
    """Return the models to compare by name, the dense one first."""
    torch.manual_seed(0)
    if options.compressed is not None:
        dense, compressed = load_pair(options.compressed, DTYPES[dtype])
        models = {DENSE: dense, "compressed": compressed}
    else:
        dense = SHAPES[shape].build(DTYPES[dtype])
        models = {DENSE: dense}
        if dtype == "bits":
            return models | {name: rounded_twin(dense, grid) for name, grid in GRIDS.items()}
        for layout in KINDS:
            for keep in options.keep:
                models[f"{layout} {keep:g}"] = compressed_twin(dense, keep, layout, options.align)
    return {name: quantised(model, dtype) for name, model in models.items()}


def compiled_name(name: str) -> str:
    """Return the name of the compiled form of a variant: "pivot-compiled 0.6" for "pivot 0.6"."""
    layout, *keep = name.split(" ")
    return " ".join([layout + COMPILED, *keep])


@torch.inference_mode()
def measure(
    models: Mapping[str, nn.Module], part: str, workload: Workload, seconds: float, compiled: bool
) -> dict[str, Any]:
    """Return speeds, ratios to the dense model, sizes and memory of each variant."""
    actions = {name: PARTS[part](model, workload) for name, model in models.items()}
    if compiled and part == "decoder":
        torch._dynamo.reset()
        twins = {compiled_name(name): model for name, model in models.items()}
        with torch._dynamo.config.patch(recompile_limit=64):
            actions |= {name: compiled_action(model, workload) for name, model in twins.items()}
        models = {**models, **twins}
    times = interleave(actions, seconds)
    ratios = speed_ups(times, DENSE)
    if DENSE + COMPILED in times:
        of_compiled = speed_ups(times, DENSE + COMPILED)
        ratios |= {n: of_compiled[n] for n in times if COMPILED in n and n != DENSE + COMPILED}
    sizes = {name: layer_sizes(linear_layers(model)) for name, model in models.items()}
    dense = sizes[DENSE]
    found = {}
    for name, model in models.items():
        grown = growth(actions[name])
        weights = weight_bytes(model)
        found[name] = {
            # Of the parameters, or of the bytes where all parameters are there in fewer bits.
            "kept": sizes[name].parameters / dense.parameters if name not in GRIDS else sizes[name].bytes / dense.bytes,
            "tokens_per_second": Spread.of([workload.new_tokens / value for value in times[name]]).to_dict(),
            "speed_up": ratios[name].to_dict(),
            "weight_bytes": weights,
            "peak_bytes": None if grown is None else weights + grown,
        }
    return {"rounds": len(times[DENSE]), "variants": found}


def run(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure every cell that is missing under these settings, and yield all cells."""
    settings = {
        "threads": torch.get_num_threads(),
        "align": options.align,
        "keep": options.keep,
        "seconds": options.seconds,
        "compressed": None if options.compressed is None else str(options.compressed.resolve()),
        "window": options.window,
        "past": options.past,
        "compile": options.compile,
        "versions": library_versions(),
    }
    for dtype in options.dtypes:
        for shape in options.shapes:
            models: dict[str, nn.Module] = {}
            for part, name, workload in cells(shape, options):
                path = options.output / "cells" / f"{shape} {dtype} {part} {name}.json".replace(" ", "_")
                cell = json.loads(path.read_text()) if path.exists() else {}
                if cell.get("settings") != settings:
                    models = models or make_variants(shape, dtype, options)
                    cell = {"shape": shape, "dtype": dtype, "part": part, "workload": name, "settings": settings}
                    cell |= measure(models, part, workload, options.seconds, options.compile)
                    write_json(cell, path)
                    print(summary(cell), flush=True)
                yield cell
            del models
            gc.collect()


def cells(shape: str, options: argparse.Namespace) -> Iterator[tuple[str, str, Workload]]:
    """Yield the measurements of a shape; a large block skips the linear layers alone, which are nearly all of it."""
    several = options.compressed is not None or SHAPES[shape].layers > 1
    for part in list(PARTS)[: None if several else 1]:
        for name, workload in workloads(options.window, options.past).items():
            yield part, name, workload


def summary(cell: Mapping[str, Any]) -> str:
    """Return one line with the result of a measurement."""
    found = ", ".join(f"{name} {v['speed_up']['median']:.2f}" for name, v in cell["variants"].items() if name != DENSE)
    return f"{cell['shape']}, {cell['dtype']}, {cell['part']}, {cell['workload']} ({cell['rounds']} rounds): {found}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("benchmarks/results/inference"))
    add("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    add("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    add("--keep", type=float, nargs="+", default=list(KEEPS), help="shares of the linear layers' parameters")
    add("--align", type=int, default=8, help="what ranks are multiples of")
    add("--window", type=int, default=512, help="tokens to prefill")
    add("--past", type=int, default=128, help="tokens in the cache of each sequence that is decoded")
    add("--seconds", type=float, default=10.0, help="of each cell, beyond five rounds")
    add("--compile", action="store_true", help="measure the decoders by torch.compile, too")
    add("--compressed", type=Path, help="folder of a compressed model to measure in place of the shapes")
    options = parser.parse_args(arguments)
    if options.compressed is not None:
        options.shapes = [options.compressed.name]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables, and save them and the figure."""
    options = parse(arguments)
    rows = result_rows(list(run(options)))
    save_table(rows, options.output / "results.csv")
    with whole_file(options.output / "results.md") as temporary:
        temporary.write_text(markdown(rows))
    figure = speed_up_figure(rows)
    with whole_file(options.output / "speed_ups.png") as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    print(markdown(rows))


if __name__ == "__main__":
    main()
