"""Compression of large shapes with random weights: seconds, peak memory, and the peak that a plan predicts.

    OMP_NUM_THREADS=1 python benchmarks/large_models.py --output benchmarks/results/large

* block: one decoder block of Llama-3-8B's shapes in float32 is calibrated on 8,192 tokens and factorised, with
  projected moments and with whole ones.
* model: a Llama of 1.1B parameters in bfloat16 goes through ``compress`` for a rank budget (projected moments) and for
  a size (moments as ``plan`` proposes them for ``--memory``). It is saved, loaded again, compared, and generates.
* peak: predicted and measured peaks of a model of 0.3B parameters in bfloat16.

Every row runs in a process of its own. Its seconds stand beside the seconds of bare forward and backward passes on the
same tokens in the same process. Existing rows of the output are not measured again, and a failed row does not end the
others. Wall-clock seconds suffer from other work on the machine; processor seconds, of all threads together, less so.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peak
import torch
from inference_models import SHAPES as BLOCKS
from inference_models import Shape
from memory import resident, restart_peak, run_alone, warm_up
from pages import write_part
from sketches import BlockModule, block_batches
from speed import bare_step
from torch import Tensor
from transformers import LlamaForCausalLM

from fasc_lightning import compress, load_compressed, plan, save_compressed
from fasc_lightning.cli import markdown_table, write_json
from fasc_lightning.compression import CompressionReport

#: Shapes, tokens and vocabulary of each part. The tiny ones are for dry runs.
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "block": BLOCKS["Llama-3-8B block"],
        "block_tokens": 8192,
        "model": Shape(2048, 5632, 32, 4, layers=22),
        "peak": Shape(1536, 4096, 12, 4, layers=8),
        "vocabulary": 32_000,
        "windows": 8,
        "window": 512,
    },
    "tiny": {
        "block": Shape(32, 96, 4, 2),
        "block_tokens": 128,
        "model": Shape(32, 96, 4, 2, layers=2),
        "peak": Shape(32, 96, 4, 2, layers=2),
        "vocabulary": 64,
        "windows": 2,
        "window": 32,
    },
}
#: Windows of the rows about peaks, which hardly depend on their number.
PEAK_WINDOWS = 2
#: Windows of bare passes; a whole calibration of them would take as long as the compression's.
BARE_WINDOWS = 1
#: Tokens that a loaded model generates.
GENERATED = 8

#: Options of the compression in each row, by its part.
BLOCK_ROWS: dict[str, dict[str, Any]] = {
    "projected": {"keep": 0.6, "sketch": "projected"},
    "whole": {"keep": 0.6, "refit": False},
}
MODEL_ROWS: dict[str, dict[str, Any]] = {"keep 0.6": {"keep": 0.6, "sketch": "projected"}, "size 0.27": {"size": 0.27}}
PEAK_ROWS: dict[str, dict[str, Any]] = {name: how for name, how in peak.ROWS.items() if name != "svd-llm"}
PARTS = {"block": BLOCK_ROWS, "model": MODEL_ROWS, "peak": PEAK_ROWS}


class Phases:
    """Wall-clock seconds, processor seconds and peak memory of the phases of this process."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measure a phase."""
        gc.collect()
        restart_peak()
        wall, processor = time.perf_counter(), time.process_time()
        yield
        self.found[name] = {
            "seconds": time.perf_counter() - wall,
            "processor": time.process_time() - processor,
            "peak": resident(),
        }
        print(f"{name}: {self.found[name]}", file=sys.stderr, flush=True)


def language_model(shape: Shape, vocabulary: int) -> LlamaForCausalLM:
    """Return a causal language model in bfloat16 with random weights, which never exist in float32."""
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM._from_config(shape.config(vocabulary), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def token_batches(sizes: Mapping[str, Any]) -> list[dict[str, Tensor]]:
    """Return windows of random tokens, because time and memory do not depend on them."""
    generator = torch.Generator().manual_seed(1)
    shape = (sizes["windows"], 1, sizes["window"])
    return [{"input_ids": ids} for ids in torch.randint(sizes["vocabulary"], shape, generator=generator)]


def figures(report: CompressionReport) -> dict[str, Any]:
    """Return the figures of a report that the tables need."""
    return {
        "seconds": report.seconds,
        "moments_bytes": report.moments_bytes,
        "kept_bytes": report.targeted["compressed"].bytes / report.targeted["dense"].bytes,
        "kept": report.kept,
        "loss": sum(layer.loss for layer in report.layers),
    }


def measure_block(options: dict[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Calibrate and factorise one block, and return the seconds of each phase beside bare passes."""
    phases, shape = Phases(), sizes["block"]
    torch.manual_seed(0)
    with phases("make"):
        module: Any = BlockModule(shape.hidden, shape.intermediate, shape.heads, shape.kv_heads)
        module.requires_grad_(False)
        batches = block_batches(shape.hidden, sizes["block_tokens"], sizes["window"])
    with phases("bare"):
        for batch in batches:
            module.training_step({**batch, "states": batch["states"].requires_grad_()}).backward()
    for batch in batches:
        batch["states"] = batch["states"].detach()
    with phases("compress"):
        report = compress(module, batches, **options, progress=False)
    return {"tokens": sizes["block_tokens"], "phases": phases.found, "report": figures(report)}


def measure_model(options: dict[str, Any], sizes: Mapping[str, Any], memory: str) -> dict[str, Any]:
    """Compress, save, load and run one model, and return the figures of each phase."""
    phases, batches = Phases(), token_batches(sizes)
    with phases("make"):
        model = language_model(sizes["model"], sizes["vocabulary"])
    forecast = plan(model, memory=memory, batch_tokens=sizes["window"], **options, **_fixed(options))
    options = {**options, **forecast.options}
    with phases("bare"):
        for batch in batches[:BARE_WINDOWS]:
            bare_step(model, batch)
    with phases("compress"):
        report = compress(model, batches, **options, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        with phases("save"):
            save_compressed(model, folder, report=report)
        stored = sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        with phases("load"):
            loaded = load_compressed(folder)
    ids = batches[0]["input_ids"]
    with phases("compare"), torch.no_grad():
        wanted, logits = model(ids).logits.float(), loaded(ids).logits.float()
    del model
    with phases("generate"):
        text = loaded.generate(ids[:, :16], max_new_tokens=GENERATED, min_new_tokens=GENERATED, do_sample=False)
    return {
        "parameters": report.whole["dense"].parameters,
        "tokens": sizes["windows"] * sizes["window"],
        "bare_tokens": BARE_WINDOWS * sizes["window"],
        "options": options,
        "predicted": forecast.peak.device,
        "phases": phases.found,
        "report": figures(report),
        "stored_bytes": stored,
        "logits_differ": float((wanted - logits).abs().max() / wanted.abs().max()),
        "generated": text.shape[1] - 16,
    }


def _fixed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a plan must not choose: the sketch that a row names."""
    return {} if "sketch" in options else {"sketch": "auto"}


def measure(part: str, row: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one row in this process."""
    sizes, options = SIZES[arguments.sizes], PARTS[part][row]
    if arguments.blocks is not None:
        sizes = {**sizes, "model": replace(sizes["model"], layers=arguments.blocks)}
    if part == "peak":
        found = peak.measure(
            options, PEAK_WINDOWS, sizes["window"], lambda: language_model(sizes["peak"], sizes["vocabulary"])
        )
    else:
        warm_up()
        before = resident()
        taken = measure_block(options, sizes) if part == "block" else measure_model(options, sizes, arguments.memory)
        found = {"before": before, **taken}
    return {**found, "threads": torch.get_num_threads()}


def _in_seconds(seconds: float) -> str:
    return f"{seconds:.0f}" if seconds >= 10 else f"{seconds:.1f}"


def phase_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the seconds and peaks of blocks or models as a Markdown table."""
    shown = []
    for name, row in rows.items():
        phases, report = row["phases"], row["report"]
        bare = phases["bare"]["processor"] * row["tokens"] / row.get("bare_tokens", row["tokens"])
        seconds = report["seconds"]
        ours = phases["compress"]["processor"]
        # Processor seconds of the two parts, in proportion to their wall-clock seconds.
        scale = ours / phases["compress"]["seconds"]
        shown.append(
            {
                "row": name,
                **({"parameters": f"{row['parameters'] / 1e9:.2f} G"} if "parameters" in row else {}),
                "threads": row["threads"],
                "bare passes": f"{bare:.0f} s",
                "calibrate": f"{seconds['calibrate'] * scale:.0f} s",
                "factorise or round": f"{seconds['factorize'] * scale:.0f} s",
                "all": f"{ours:.0f} s ({ours / bare:.1f} times bare)",
                **{what: f"{_in_seconds(phases[what]['seconds'])} s" for what in ("save", "load") if what in phases},
                "peak GB": f"{phases['compress']['peak'] / 1e9:.1f}",
                "bytes kept": f"{report['kept_bytes']:.0%}",
            }
        )
    return markdown_table(shown)


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the tables of all parts that have rows."""
    parts = []
    for part, title in (("block", "One block of 8B shapes"), ("model", "1.1B parameters"), ("peak", "Peaks")):
        rows = results.get(part, {})
        if rows:
            parts += [f"### {title}", peak.table(dict(rows)) if part == "peak" else phase_table(rows)]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the missing rows, print the tables and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/large"))
    parser.add_argument("--write", type=Path, help="page whose generated part is replaced")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--sizes", choices=list(SIZES), default="full")
    parser.add_argument("--memory", default="14GB", help="that the moments of a size are planned for")
    parser.add_argument("--blocks", type=int, help="of the model; fewer than 22 measure a part in less time")
    parser.add_argument("--row", nargs=2, metavar=("PART", "NAME"), help="measure this one in this process")
    options = parser.parse_args(arguments)
    if options.row is not None:  # in the measuring process, whose last line is the result
        part, name = options.row
        print(json.dumps(measure(part, name, options)))
        return
    path = options.output / "large_models.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    failed = []
    for part in options.parts:
        for name in PARTS[part]:
            if name in results.get(part, {}):
                continue
            how = ["--sizes", options.sizes, "--memory", options.memory]
            how += [] if options.blocks is None else ["--blocks", str(options.blocks)]
            try:
                taken = run_alone(__file__, ["--row", part, name, *how])
            except subprocess.CalledProcessError as error:  # the other rows may still be measured
                failed.append(f"{part}, {name} (exit code {error.returncode})")
                continue
            results.setdefault(part, {})[name] = taken
            write_json(results, path)
    text = page(results)
    print(text)
    if options.write is not None:
        write_part(options.write, "large_models.py", text)
    if failed:
        sys.exit(f"Expected every row to be measured but these failed: {'; '.join(failed)}.")


if __name__ == "__main__":
    main()
