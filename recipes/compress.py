"""Compress a language model, measure its loss of quality, and save it.

The defaults need no data and no network: SmolLM2-135M-Instruct from an installed wheel is calibrated on text that it
samples itself, and evaluated on the Python reference and on facts about countries:

    python recipes/compress.py

With your own data:

    python recipes/compress.py --model FOLDER_OR_HUB_ID --calibration a.txt b.jsonl --keep 0.8 \
        --eval-text news=news.txt --eval-facts facts.jsonl --output compressed --report report.json

Every option can also stand in a YAML file given as `--config FILE`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from fasc_lightning import CompressionReport, compress
from fasc_lightning.cli import (
    Clock,
    add_compression_options,
    add_evaluation_options,
    add_output_options,
    add_source_options,
    calibration_of,
    check_run,
    compression_options,
    measurement_lines,
    questions_of,
    save_results,
)
from fasc_lightning.data import load_model, window_loader
from fasc_lightning.evaluation import Quality, compare_facts, compare_perplexity
from fasc_lightning.layers import QUANTIZATIONS


def build_parser() -> ArgumentParser:
    """Return the parser of this recipe's options."""
    parser = ArgumentParser(prog="compress.py", description=(__doc__ or "").split("\n")[0])
    add_source_options(parser, windows=64)
    add_compression_options(parser)
    parser.add_argument(
        "--quantize", choices=list(QUANTIZATIONS), help="hold the targeted layers in int8 when all else is done"
    )
    add_evaluation_options(parser, windows=32)
    add_output_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe and return the report that it writes."""
    options = build_parser().parse_args(list(sys.argv[1:] if arguments is None else arguments))
    check_run(options)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock()
    with clock("load"):
        model, tokenizer = load_model(options.model)
        model.eval().to(device)
        questions = questions_of(options, tokenizer)
    with clock("data"):
        print(
            f"Calibrating on {options.windows} windows of {options.window} tokens from {', '.join(options.calibration)}"
        )
        calibration = calibration_of(options, tokenizer, model)
    with clock("evaluate"):
        print("Evaluating the dense model")
        dense = questions.measure(model, tokenizer)

    report = compress(
        model,
        window_loader(calibration, options.batch_size),
        quantize=options.quantize,
        **compression_options(options),
    )

    with clock("evaluate"):
        print("Evaluating the compressed model")
        compressed = questions.measure(model, tokenizer)

    content = full_report(options, report, clock.seconds, {"dense": dense, "compressed": compressed})
    print(f"\n{report}\n", *measurement_lines(content), sep="\n")
    print(save_results(options, model, tokenizer, content))
    return content


def full_report(
    options: Namespace, report: CompressionReport, seconds: dict[str, float], states: dict[str, Quality]
) -> dict[str, Any]:
    """Return the compression's report with the model, the recipe's options and the evaluation."""
    content = report.to_dict()
    recipe = ("calibration", "windows", "window", "batch_size", "eval_text", "eval_facts", "eval_windows")
    content["model"] = options.model
    content["options"] = {**content["options"], **{name: options[name] for name in recipe}}
    content["perplexity"] = compare_perplexity(states)
    content["facts"] = compare_facts(states)
    content["seconds"] = {**seconds, **report.seconds}
    return content


if __name__ == "__main__":
    main()
