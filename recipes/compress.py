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
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, get_args

from jsonargparse import Namespace

from fasc_lightning import CompressionReport, compress
from fasc_lightning.cli import (
    AUTO,
    Clock,
    CommandParser,
    add_compression_options,
    add_dtype_option,
    add_evaluation_options,
    add_output_options,
    add_source_options,
    calibration_of,
    calibration_precision,
    check_run,
    compression_options,
    device_of,
    dtype_of,
    measurement_lines,
    measurements,
    quality_line,
    questions_of,
    run_program,
    save_results,
    saving,
)
from fasc_lightning.data import SELF, load_model, window_loader
from fasc_lightning.evaluation import Quality, Questions
from fasc_lightning.layers import bytes_in_16_bits, dequantized, select_layers, swap_modules
from fasc_lightning.models import attach_config, quantize_layers
from fasc_lightning.options import Precision, Quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Plain rounding, beside which the result is set: int8 with a scale for each output, 4 bits in groups of 64.
CONTROLS = {
    "int8 to the nearest": Quantize(8, group=None, symmetric=True, rounding="nearest"),
    "int4 to the nearest": Quantize(4, rounding="nearest"),
}

#: The default budget: 27 % of the bytes. Bits chosen layer by layer lose no less there, and take four times as long.
BUDGET = ("quantize", "int4")


def build_parser() -> CommandParser:
    """Return the parser of this recipe's options."""
    parser = CommandParser(__doc__)
    add_source_options(parser, windows=64)
    add_compression_options(parser, f"{BUDGET[0]} {BUDGET[1]}")
    add_evaluation_options(parser, windows=32)
    add_output_options(parser)
    add_dtype_option(parser)
    parser.add_argument(
        "--precision",
        choices=(AUTO, *get_args(Precision)),
        default=AUTO,
        help="of the calibration; auto: bf16-mixed for a float32 model where the device multiplies bfloat16 faster",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe and return the report that it writes."""
    options = build_parser().parse_args(list(sys.argv[1:] if arguments is None else arguments))
    check_run(options, BUDGET)
    device = device_of(options.device)
    clock = Clock()
    with clock("load"):
        model, tokenizer = load_model(options.model, dtype_of(options.dtype))
        model.eval().to(device)
        options.precision = calibration_precision(options.precision, model)
        questions = questions_of(options, tokenizer)
    print(
        f"Calibrating on {options.windows} windows of {options.window} tokens from "
        f"{', '.join(options.calibration)}{f', in {options.precision}' if options.precision else ''}"
    )
    with clock("data"):
        # Files are read at once, to refuse short ones; the model samples text later, so that figures come sooner.
        calibration = None if SELF in options.calibration else calibration_of(options, tokenizer, model)
    with clock("evaluate"):
        print("Evaluating the dense model")
        dense = questions.measure(model, tokenizer)
        questions = questions.compared_with(model)
        print(quality_line(dense))
    if calibration is None:
        with clock("data"):
            print("Sampling text from the model")
            calibration = calibration_of(options, tokenizer, model)
    controls: dict[str, Any] = {}
    if options.size is not None or options.quantize is not None:
        with clock("controls"):
            print("Evaluating plain rounding to the nearest numbers")
            texts = Questions(questions.texts)
            for name, form in CONTROLS.items():
                controls[name] = nearest(model, tokenizer, form, options, texts)
                print(f"  {name}: {', '.join(f'{k} {v:.2f}' for k, v in controls[name]['perplexity'].items())}")

    with saving():
        report = compress(
            model,
            window_loader(calibration, options.batch_size),
            precision=options.precision,
            **compression_options(options),
        )

    with clock("evaluate"):
        print("Evaluating the compressed model")
        with dequantized(model):
            compressed = questions.measure(model, tokenizer)

    content = full_report(options, report, clock.seconds, {"dense": dense, "compressed": compressed})
    if controls:
        content["controls"] = controls
    print(*measurement_lines(content), *control_lines(content), sep="\n")
    print(save_results(options, model, tokenizer, content))
    return content


def nearest(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    form: Quantize,
    options: Namespace,
    questions: Questions,
) -> dict[str, Any]:
    """Return the bytes and perplexities of the model with the targeted layers rounded to the nearest numbers.

    The model is dense again afterwards.
    """
    layers = select_layers(model, options.targets, options.exclude)
    replaced = quantize_layers(model, layers, form)
    try:
        rounded = [model.get_submodule(name) for name in layers]
        stored = sum(bytes_in_16_bits((*layer.parameters(), *layer.buffers())) for layer in rounded)
        dense = sum(bytes_in_16_bits(layer.parameters()) for layer in layers.values())
        with dequantized(model):
            return {"size": stored / dense, "perplexity": questions.measure(model, tokenizer).perplexity}
    finally:
        swap_modules(model, replaced)
        attach_config(model)


def control_lines(content: dict[str, Any]) -> Iterator[str]:
    """Yield a line about each control."""
    for name, found in content.get("controls", {}).items():
        values = ", ".join(
            f"{text} {value:.2f} ({value / content['perplexity'][text]['dense']:.3f} of dense)"
            for text, value in found["perplexity"].items()
        )
        yield f"{name}, {found['size']:.1%} of the bytes: perplexity of {values}"


def full_report(
    options: Namespace, report: CompressionReport, seconds: dict[str, float], states: dict[str, Quality]
) -> dict[str, Any]:
    """Return the compression's report with the model, the recipe's options and the evaluation."""
    content = report.to_dict()
    sizes = ("calibration", "windows", "window", "batch_size", "precision")
    recipe = (*sizes, "eval_text", "eval_facts", "eval_windows", "minimal_pairs", "kl_windows")
    content["model"] = options.model
    content["options"] = {**content["options"], **{name: options[name] for name in recipe}}
    content |= measurements(states)
    content["seconds"] = {**seconds, **report.seconds}
    return content


if __name__ == "__main__":
    run_program(main)
