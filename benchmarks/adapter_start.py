"""The start of adapters: zero, what was lost in the metric of the weights, and what was lost in that of the loss.

    FASC_DATA=<folder with the texts> python benchmarks/adapter_start.py --output benchmarks/results/adapter_start

SmolLM2-135M-Instruct is rounded to the nearest numbers of 3 bits, as by a program without calibration. LoRA adapters
of peft are put on its layers and trained on labels, each start on the same tokens in the same order. Perplexity is
measured before, and after. "weights" is the best B A for the weights themselves, the singular value decomposition of
W - W'. "loss" is fasc_lightning.lora_start. The texts calibrate, train and judge on different windows; the first
judging text is of none of the other files. Each row is kept when it ends: delete the folder after a change of the code.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from fasc_variants import CALIBRATION, JUDGES
from recovery import WINDOW, train_adapters

from fasc_lightning import LoraRecovery, LoraStart, lora_start, quantize, to_dense
from fasc_lightning.cli import KERNEL_CACHE, markdown_table, write_json
from fasc_lightning.data import calibration_windows, file_windows, load_model, window_loader
from fasc_lightning.evaluation import perplexity
from fasc_lightning.layers import linear_weight, select_layers
from fasc_lightning.lora_start import LayerStart, balanced
from fasc_lightning.options import Precision, Quantize

STARTS = ("zero", "weights", "loss")


@torch.no_grad()
def weights_start(model: Any, dense: Any, r: int) -> LoraStart:
    """Return the adapters that are nearest to W - W' in the weights themselves."""
    found = {}
    for name, layer in select_layers(dense).items():
        U, S, V = torch.linalg.svd(linear_weight(layer) - linear_weight(model.get_submodule(name)), full_matrices=False)
        B, A = balanced(U[:, :r] * S[:r], V[:r])
        found[name] = LayerStart(A, B, float(S.square().sum()), float(S[r:].square().sum()))
    return LoraStart(found, conv1d=False)


def adapted(model: Any, names: Sequence[str], start: LoraStart | None, r: int, folder: Path) -> Any:
    """Put the adapters of a start on a model; None is peft's own start at zero."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if start is not None:
        return PeftModel.from_pretrained(model, str(start.save(folder)), is_trainable=True)
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=list(names), task_type="CAUSAL_LM"))


def measure(model: Any, judges: dict[str, Any]) -> dict[str, float]:
    """Return the perplexity of each judging text."""
    return {name: perplexity(model, windows) for name, windows in judges.items()}


def run(name: str, bits: int, options: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Return the row of a start."""
    dense, tokenizer = load_model(options.model)
    dense.eval().requires_grad_(False)
    judges = {
        text: file_windows(data / file, tokenizer, first + options.eval_windows, options.window)[first:]
        for text, (file, first) in JUDGES.items()
    }
    files = [str(data / file) for file in CALIBRATION]

    def loader(count: int, seed: int) -> Any:
        found = calibration_windows(files, tokenizer, windows=count, window=options.window, seed=seed)
        return window_loader(found, 1)

    if name == "dense":
        return {"start": name, "bits": 16, "before": measure(dense, judges)}
    model = copy.deepcopy(dense)
    quantize(model, Quantize(bits, 64, rounding="nearest"))
    to_dense(model)
    names, start, began = list(select_layers(dense)), None, time.perf_counter()
    if name == "weights":
        start = weights_start(model, dense, options.r)
    elif name == "loss":
        start = lora_start(model, dense, loader(options.windows, seed=0), options.r, progress=False)
    seconds = time.perf_counter() - began
    model = adapted(model, names, start, options.r, options.output / f"{name}-{bits}-adapter")
    before = measure(model, judges)
    row = {"start": name, "bits": bits, "before": before, "seconds": seconds}
    if options.tokens:
        began = time.perf_counter()
        recovery = LoraRecovery(learning_rate=options.rate, precision=options.precision)
        train_adapters(model, loader(math.ceil(options.tokens / options.window), seed=1), recovery)
        row |= {"after": measure(model, judges), "training seconds": time.perf_counter() - began}
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = []
    for row in rows:
        figures = {
            f"{name}, {state}": f"{value[name]:.2f}" if (value := row.get(when)) else ""
            for when, state in (("before", "before training"), ("after", "after"))
            for name in JUDGES
        }
        lines.append({"start": row["start"], "bits": row["bits"], **figures})
    return markdown_table(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all missing rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("benchmarks/results/adapter_start"))
    add("--model", default="smollm2")
    add("--bits", type=int, nargs="*", default=[3])
    add("--r", type=int, default=16)
    add("--windows", type=int, default=16, help="of the calibration of the start")
    add("--tokens", type=int, default=32_768, help="of the training")
    add("--rate", type=float, default=LoraRecovery().rate)
    add("--window", type=int, default=WINDOW)
    add("--eval-windows", type=int, default=16)
    add("--precision", default="bf16-mixed", choices=get_args(Precision), help="of the training")
    options = parser.parse_args(arguments)
    folder = os.environ.get("FASC_DATA")
    if folder is None:
        sys.exit("Expected FASC_DATA to name the folder that holds the texts.")
    for name, value in KERNEL_CACHE.items():
        os.environ.setdefault(name, value)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, bits in [("dense", 16), *((name, bits) for bits in options.bits for name in STARTS)]:
        path = options.output / f"{name}-{bits}.json"
        if not path.exists():
            write_json(run(name, bits, options, Path(folder)), path)
        rows.append(json.loads(path.read_text()))
        print(table(rows[-1:]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
