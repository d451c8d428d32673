"""The time of compression, as ratios measured within one run.

    python benchmarks/speed.py --output benchmarks/results

* calibration: tokens per second, with every token, with every token as for the same bits in all layers (a quarter of
  them in G), and with a quarter of the tokens, against a bare forward pass and backward pass to the activations of the
  same model and batches;
* factorising: all layers (fasc: statistics in, built layers out), against torch.linalg.svd of their weights in the
  same dtype (float64).

Pairs are interleaved because machines are noisy. Calibration is summed over the batches, and every eighth batch has its
dependence scored, as in a fit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from interleaved import timed

from fasc_lightning.batches import TokenRows, sample_seeds
from fasc_lightning.calibration import SCORE_EVERY, SCORE_TOKENS
from fasc_lightning.cli import write_json
from fasc_lightning.compression import compress_layers
from fasc_lightning.data import load_model, text_windows
from fasc_lightning.dependence import LayerScores
from fasc_lightning.evaluation import builtin_text
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import layer_shapes, linear_weight, select_layers
from fasc_lightning.module import CausalLMModule
from fasc_lightning.options import CompressionOptions
from fasc_lightning.solvers import solver_needs
from fasc_lightning.statistics import CalibrationMoments

#: What fasc reads, as a fit gathers it.
NEEDS = solver_needs("fasc")
#: Share of the tokens that enter the moments, and of these in G, by arm.
ARMS = {
    "every token": (1.0, 1.0),
    "every token, 4 bits": (1.0, CompressionOptions(quantize="int4").output_share),
    "a quarter": (0.25, 1.0),
}
#: Ratio to bare that is wanted of each arm.
WANTED = {"every token": 0.85, "every token, 4 bits": 0.85, "a quarter": 0.95}


def bare_step(model: Any, batch: dict[str, torch.Tensor]) -> None:
    """Run forward and backward to the activations, without weight gradients and statistics."""
    embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
    model(inputs_embeds=embedded, labels=batch["input_ids"], use_cache=False).loss.backward()


def calibration_step(
    taps: Taps, module: CausalLMModule, batch: dict[str, torch.Tensor], fraction: float, scored: bool
) -> None:
    """Run the same with statistics, as in a frozen fit."""
    seeds = sample_seeds(batch, 0) if fraction < 1 else ()
    taps.install()
    rows = TokenRows(scale=module.loss_terms(batch), fraction=fraction, sample_seeds=seeds, scored=scored)
    taps.begin_batch(rows)
    module.model(input_ids=batch["input_ids"], labels=batch["input_ids"], use_cache=False).loss.backward()
    taps.end_batch()
    taps.remove()


def calibration_speed(
    model: Any, batches: list[dict[str, torch.Tensor]]
) -> tuple[dict[str, Any], dict[str, Any], CalibrationMoments]:
    """Time bare steps and the steps of each arm in turn on the same batches."""
    module = CausalLMModule(model)
    layers = select_layers(model)
    shapes = layer_shapes(layers)
    moments = {
        arm: CalibrationMoments(shapes, needs=NEEDS, output_share=of_outputs) for arm, (_, of_outputs) in ARMS.items()
    }
    scores = LayerScores(layers, SCORE_TOKENS)
    taps = {arm: Taps(layers, moments[arm], scores) for arm in ARMS}
    seconds: dict[str, list[float]] = {"bare": [], **{arm: [] for arm in ARMS}}
    bare_step(model, batches[0])  # warm-up
    for arm, (fraction, _) in ARMS.items():
        calibration_step(taps[arm], module, batches[0], fraction, True)
    for i, batch in enumerate(batches):
        scored = i % SCORE_EVERY == 0
        seconds["bare"].append(timed(partial(bare_step, model, batch)))
        for arm, (fraction, _) in ARMS.items():
            step = partial(calibration_step, taps[arm], module, batch, fraction, scored)
            seconds[arm].append(timed(step))
    tokens = batches[0]["input_ids"].numel()
    ratios = {name: sum(seconds["bare"]) / sum(seconds[name]) for name in ARMS}
    speeds = {name: tokens * len(values) / sum(values) for name, values in seconds.items()}
    return speeds, ratios, moments["every token"]


def factorising_speed(model: Any, moments: CalibrationMoments) -> dict[str, float]:
    """Time factorising against plain SVDs of the weights."""
    layers = select_layers(model)
    weights = [linear_weight(module).detach().double() for module in layers.values()]
    torch.linalg.svd(weights[0], full_matrices=False)  # warm-up
    before = timed(lambda: [torch.linalg.svd(W, full_matrices=False) for W in weights])
    ours = timed(lambda: compress_layers(layers, moments, keep=0.8))
    after = timed(lambda: [torch.linalg.svd(W, full_matrices=False) for W in weights])
    return {"svd": (before + after) / 2, "compress_layers": ours, "ratio": 2 * ours / (before + after)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all, print, and save as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args(arguments)
    model, tokenizer = load_model("smollm2")
    model.eval().requires_grad_(False)
    windows = text_windows(builtin_text(), tokenizer, options.batches * options.batch_size, options.window)
    batches = [{"input_ids": ids} for ids in windows.split(options.batch_size)]
    speeds, ratios, moments = calibration_speed(model, batches)
    held = moments.nbytes
    factorising = factorising_speed(model, moments)
    result = {
        "threads": torch.get_num_threads(),
        "tokens_per_second": speeds,
        "of_bare": ratios,
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "moments_bytes": held,
        "factorising": factorising,
    }
    write_json(result, options.output / "speed.json")
    for name, speed in speeds.items():
        ratio = f"  {ratios[name]:.2f} of bare (at least {WANTED[name]} wanted)" if name in ratios else ""
        print(f"calibration, {name:20s} {speed:7.1f} tokens/s{ratio}")
    print(
        f"factorising {factorising['compress_layers']:.1f} s, SVD of the weights {factorising['svd']:.1f} s: "
        f"{factorising['ratio']:.2f} times (at most 1 wanted)"
    )


if __name__ == "__main__":
    main()
