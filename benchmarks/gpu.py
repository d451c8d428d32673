"""Calibration, compression, monitoring and inference on one accelerator, in one command of at most nine minutes.

    python benchmarks/gpu.py --output benchmarks/results/gpu --write docs/gpu.md
    python benchmarks/gpu.py --device cpu --shapes tiny --output out    # a dry run in seconds

The models are decoders of the shapes of Llama-3.2-1B (all blocks) and of Llama-3-8B (some blocks) in bfloat16, with
random weights, because times depend on shapes alone. Each model is compressed by :func:`fasc_lightning.compress` to a
low rank with a refit, and rounded to 8 and to 4 bits. The report gives the seconds of each phase. Prefilling and
decoding are timed in turn beside the dense model. A shape begins only while ``--seconds`` last; a finished shape is
saved, and not measured again under the same settings (delete the file after a change of the code). The peak memory of
a phase includes the models that were compressed before.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from inference import workloads
from inference_models import SHAPES as BLOCKS
from inference_models import Shape, decoder_action
from interleaved import interleave, speed_ups, timed, wait_for
from monitoring import measure as observed
from pages import write_part
from speed import bare_step
from torch import nn
from transformers import LlamaForCausalLM

from fasc_lightning import compress
from fasc_lightning.cli import markdown_table, write_json
from fasc_lightning.models import prepare_decoding

SHAPES = {
    "Llama-3.2-1B": replace(BLOCKS["Llama-3.2-1B block"], layers=16),
    "Llama-3-8B, 4 blocks": replace(BLOCKS["Llama-3-8B block"], layers=4),
    "tiny": Shape(32, 64, 2, 1, layers=2),
}
#: The tiny shape is for dry runs.
DEFAULT_SHAPES = [name for name in SHAPES if name != "tiny"]
VOCABULARY = 32_000
#: Training steps, every other one observed.
OBSERVED_STEPS = 8

#: Options of each compressed model.
FORMS: dict[str, dict[str, Any]] = {
    "keep 0.6": {"keep": 0.6, "refit": True},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
}


def waited(action: Callable[[], Any], device: torch.device) -> Callable[[], None]:
    """Return an action that ends when the device has done it."""

    def run() -> None:
        action()
        wait_for(device)

    return run


def build(shape: Shape, vocabulary: int, device: torch.device) -> LlamaForCausalLM:
    """Return a causal language model of a shape in bfloat16 with random weights, in eval mode."""
    with device:
        model: Any = LlamaForCausalLM(shape.config(vocabulary))
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def bare_speed(model: Any, batches: Sequence[dict[str, torch.Tensor]], device: torch.device) -> float:
    """Return tokens a second of bare forward and backward passes, after one batch that does not count."""

    def steps() -> None:
        for batch in batches[1:]:
            bare_step(model, batch)

    step = waited(steps, device)
    bare_step(model, batches[0])
    wait_for(device)
    return sum(batch["input_ids"].numel() for batch in batches[1:]) / timed(step)


def compressed(model: Any, batches: list[dict[str, torch.Tensor]], options: Mapping[str, Any]) -> dict[str, Any]:
    """Compress a model in place, and return the seconds of each phase and the peak memory."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    start = time.perf_counter()
    report = compress(model, batches, progress=False, **options)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    return {
        "seconds": {**report.seconds, "all": time.perf_counter() - start},
        "calibrate tokens/s": tokens / report.seconds["calibrate"],
        "bytes kept": report.targeted["compressed"].bytes / report.targeted["dense"].bytes,
        "peak bytes": report.peak_memory_bytes,
    }


@torch.inference_mode()
def inference(models: Mapping[str, nn.Module], options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Return the speed of each model at each workload, and its ratio to the dense one."""
    found: dict[str, Any] = {}
    for name, work in workloads(options.window, options.past).items():
        actions = {form: waited(decoder_action(model, work), device) for form, model in models.items()}
        times = interleave(actions, options.seconds_a_cell)
        ratios = speed_ups(times, "dense")
        found[name] = {
            form: {"tokens/s": work.new_tokens / statistics.median(values), "times dense": ratios[form].median}
            for form, values in times.items()
        }
    return found


def measure(shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    """Return all figures of one shape."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    model = build(shape, options.vocabulary, device)
    ids = torch.randint(options.vocabulary, (options.windows, options.batch, options.window), device=device)
    batches = [{"input_ids": part} for part in ids]
    result: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
    result["bare tokens/s"] = bare_speed(model, batches, device)
    models, result["forms"] = {"dense": model.base_model}, {}
    for form, how in FORMS.items():
        other = copy.deepcopy(model)
        result["forms"][form] = compressed(other, batches, how)
        prepare_decoding(other)
        models[form] = other.base_model.eval().requires_grad_(False)
    result["inference"] = inference(models, options, device)
    del models
    gc.collect()
    accelerator = "cpu" if device.type == "cpu" else "gpu"
    model.train().requires_grad_(True)
    result["monitoring"] = observed(model, options.batch, options.window, OBSERVED_STEPS, accelerator)
    return result


def page(results: Mapping[str, Mapping[str, Any]], device: str) -> str:
    """Return the tables of a page."""
    phases, speeds = [], []
    for shape, found in results.items():
        for form, figures in found["forms"].items():
            seconds = figures["seconds"]
            of_bare = figures["calibrate tokens/s"] / found["bare tokens/s"]
            phases.append(
                {
                    "model": shape,
                    "form": form,
                    "calibrate, tokens/s": f"{figures['calibrate tokens/s']:,.0f} ({of_bare:.2f} of bare)",
                    "factorise or round, s": f"{seconds['factorize']:.1f}",
                    "refit, s": f"{seconds.get('refit', 0.0):.1f}",
                    "all, s": f"{seconds['all']:.1f}",
                    "peak GB": f"{figures['peak bytes'] / 1e9:.1f}",
                    "bytes kept": f"{100 * figures['bytes kept']:.0f} %",
                }
            )
        for form in next(iter(found["inference"].values())):
            cells = {
                work: f"{forms[form]['tokens/s']:,.0f} ({forms[form]['times dense']:.2f}x)"
                for work, forms in found["inference"].items()
            }
            speeds.append({"model": shape, "form": form, **cells})
    watching = [
        {"model": shape, "an observation, steps": f"{found['monitoring']['observation_in_steps']:.2f}"}
        for shape, found in results.items()
    ]
    parts = [f"{device}, torch {torch.__version__}, bfloat16.", "### Compressing", markdown_table(phases)]
    parts += ["### Inference", markdown_table(speeds), "### Tracking rho", markdown_table(watching)]
    return "\n\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the missing shapes, print the tables and save them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("benchmarks/results/gpu"))
    add("--write", type=Path, help="page whose generated part is replaced")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--shapes", nargs="+", choices=list(SHAPES), default=DEFAULT_SHAPES)
    add("--windows", type=int, default=8, help="calibration batches")
    add("--batch", type=int, default=4, help="windows in a batch")
    add("--window", type=int, default=512)
    add("--past", type=int, default=512, help="tokens in the cache of each sequence that is decoded")
    add("--vocabulary", type=int, default=VOCABULARY)
    add("--seconds", type=float, default=400.0, help="no shape begins after this")
    add("--seconds-a-cell", type=float, default=2.0, help="of each timing, beyond five rounds")
    options = parser.parse_args(arguments)
    if options.windows < 2:
        sys.exit(f"Expected --windows to be at least 2, since the first is not timed, but got {options.windows}.")
    end = time.perf_counter() + options.seconds
    device = torch.device(options.device)
    title = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    sizes = ("windows", "batch", "window", "past", "vocabulary", "seconds_a_cell")
    settings = {"device": title, **{name: getattr(options, name) for name in sizes}}
    results = {}
    for name in options.shapes:
        path = options.output / f"{name}.json".replace(" ", "_")
        saved = json.loads(path.read_text()) if path.exists() else {}
        if saved.get("settings") != settings:
            if time.perf_counter() > end:
                print(f"{name} is left out: {options.seconds:.0f} s are over.")
                continue
            saved = {"settings": settings, **measure(SHAPES[name], options)}
            write_json(saved, path)
        results[name] = saved
    if not results:
        sys.exit("Expected time for one shape at least: raise --seconds.")
    text = page(results, title)
    print(text)
    if options.write is not None:
        write_part(options.write, "gpu.py", text)


if __name__ == "__main__":
    main()
