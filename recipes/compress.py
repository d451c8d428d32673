"""Compress a language model, measure what it lost, save it.

On its defaults it needs no data and no network: SmolLM2-135M-Instruct from an installed wheel is calibrated on text
that it samples itself, and evaluated on the Python reference and on facts about countries:

    python recipes/compress.py

With data of your own:

    python recipes/compress.py --model FOLDER_OR_HUB_ID --calibration a.txt b.jsonl --keep 0.8 \
        --eval-text news=news.txt --eval-facts facts.jsonl --output compressed --report report.json

Every option can also stand in a YAML file given as `--config FILE`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor

from fasc_lightning import CompressionReport, FascCallback, compress, save_compressed
from fasc_lightning._options import add_source_options, add_text_options
from fasc_lightning.allocation import ALLOCATIONS
from fasc_lightning.bundled import SMOLLM2, SMOLLM2_LICENCE, SMOLLM2_SOURCE, load_model
from fasc_lightning.data import (
    calibration_windows,
    check_file,
    named_files,
    read_text,
    text_windows,
    window_loader,
)
from fasc_lightning.evaluation import (
    Fact,
    FactsResult,
    builtin_facts,
    builtin_text,
    factual_recall,
    load_facts,
    perplexity,
)
from fasc_lightning.quantized_layers import QUANTIZATIONS
from fasc_lightning.report import write_json
from fasc_lightning.saving import check_folder
from fasc_lightning.solvers import available_methods


def build_parser() -> ArgumentParser:
    """Return the parser of this recipe's options."""
    parser = ArgumentParser(prog="compress.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add_source_options(parser, windows=64)
    add(
        "--rank",
        type=int | float,
        help="fraction of full rank (0.5) or absolute rank (256); 0.5 if --keep is not given",
    )
    add("--keep", type=float, help="fraction of the targeted parameters to keep, instead of --rank")
    add("--method", default="fasc", choices=available_methods(), help="solver")
    add("--allocation", default="measured", choices=list(ALLOCATIONS), help="how the budget is spent over layers")
    add("--layout", default="auto", choices=["auto", "pivot", "factors"], help="how a low-rank matrix is stored")
    add("--align", type=int, default=1, help="what ranks are multiples of (8 suits matrix products)")
    add("--refit", default="true", choices=["true", "false"], help="whether factors are refitted to drifted inputs")
    add("--quantize", choices=list(QUANTIZATIONS), help="hold the targeted layers in int8 when all else is done")
    add("--token-fraction", type=float, default=1.0, help="share of the tokens that enters the moments")
    add("--batch-size", type=int, default=1, help="windows a forward pass")
    add("--seed", type=int, default=0, help="of sampling, shuffling and subsampling")
    add_text_options(parser, windows=32)
    add("--eval-facts", help="jsonl file with subject, relation, template, object, kind")
    add("--output", help="folder for the compressed model, its tokenizer and its model card")
    add("--licence", help="of the model, for the card; default: what the README.md of the model's folder says")
    add("--report", help="JSON file for the report")
    add("--device", help="default: cuda if there is one")
    return parser


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe; returns the report that it writes."""
    options = check(build_parser().parse_args(list(sys.argv[1:] if arguments is None else arguments)))
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    seconds: dict[str, float] = {}

    start = time.perf_counter()
    model, tokenizer = load_model(options.model)
    model.eval().to(device)
    texts, facts = evaluation_data(options, tokenizer)
    seconds["load"] = time.perf_counter() - start

    start = time.perf_counter()
    print(f"Calibrating on {options.windows} windows of {options.window} tokens from {', '.join(options.calibration)}")
    calibration = calibration_windows(
        options.calibration,
        tokenizer,
        windows=options.windows,
        window=options.window,
        seed=options.seed,
        model=model,
    )
    seconds["data"] = time.perf_counter() - start

    start = time.perf_counter()
    print("Evaluating the dense model")
    dense = evaluate(model, tokenizer, texts, facts)
    seconds["evaluate"] = time.perf_counter() - start

    report = compress(
        model,
        window_loader(calibration, options.batch_size),
        rank=options.rank,
        keep=options.keep,
        method=options.method,
        allocation=options.allocation,
        layout=options.layout,
        align=options.align,
        refit=options.refit == "true",
        quantize=options.quantize,
        token_fraction=options.token_fraction,
        seed=options.seed,
    )

    start = time.perf_counter()
    print("Evaluating the compressed model")
    compressed = evaluate(model, tokenizer, texts, facts)
    seconds["evaluate"] += time.perf_counter() - start

    content = full_report(options, report, seconds, dense, compressed)
    print_report(report, content)
    try:
        if options.output:
            content["saved_bytes"] = save(options, model, tokenizer, content)
    finally:  # a full disk must not cost the figures as well
        if options.report:
            write_json(content, options.report)
    return content


def check(options: Namespace) -> Namespace:
    """Fill in what depends on other options, and refuse what cannot work before anything is loaded.

    Raises:
        ValueError: If an option is out of range.
        FileNotFoundError: If a file is missing.
        FileExistsError: If --output holds files, but no saved model.
    """
    if options.rank is None and options.keep is None:
        options.rank = 0.5
    # Refuses wrong values.
    FascCallback(rank=options.rank, keep=options.keep, align=options.align, token_fraction=options.token_fraction)
    for name in ("windows", "window", "eval_windows", "batch_size"):
        if options[name] < 1:
            raise ValueError(f"Expected --{name.replace('_', '-')} to be at least 1 but got {options[name]}.")
    options.eval_text = named_files(options.eval_text)
    if options.eval_facts:
        check_file(options.eval_facts)
    if options.output:
        check_folder(options.output)
    return options


def evaluation_data(options: Namespace, tokenizer: Any) -> tuple[dict[str, Tensor], list[Fact]]:
    """Return texts as windows, and facts: the user's, or the built-in ones if neither is given."""
    builtin = not options.eval_text and not options.eval_facts
    texts = {name: read_text(path) for name, path in options.eval_text.items()}
    if builtin:
        texts = {"python-reference": builtin_text()}
    windows: dict[str, Tensor] = {
        name: text_windows(text, tokenizer, options.eval_windows, options.window) for name, text in texts.items()
    }
    if builtin:
        return windows, builtin_facts(options.seed)
    return windows, load_facts(options.eval_facts) if options.eval_facts else []


def evaluate(
    model: Any, tokenizer: Any, texts: dict[str, Tensor], facts: list[Fact]
) -> tuple[dict[str, float], FactsResult | None]:
    """Return the perplexity of each text, and factual recall if there are facts."""
    perplexities = {name: perplexity(model, windows, batch_size=2) for name, windows in texts.items()}
    return perplexities, factual_recall(model, tokenizer, facts) if facts else None


def full_report(
    options: Namespace,
    report: CompressionReport,
    seconds: dict[str, float],
    dense: tuple[dict[str, float], FactsResult | None],
    compressed: tuple[dict[str, float], FactsResult | None],
) -> dict[str, Any]:
    """Return the compression's report with the model, the recipe's options and the evaluation."""
    content = report.to_dict()
    recipe = ("calibration", "windows", "window", "batch_size", "eval_text", "eval_facts", "eval_windows")
    content["model"] = options.model
    content["options"] = {**content["options"], **{name: options[name] for name in recipe}}
    content["perplexity"] = {
        name: {"dense": value, "compressed": compressed[0][name]} for name, value in dense[0].items()
    }
    content["facts"] = compare_facts(dense[1], compressed[1])
    content["seconds"] = {**seconds, **report.seconds}
    return content


def compare_facts(dense: FactsResult | None, compressed: FactsResult | None) -> dict[str, Any] | None:
    """Return factual recall before and after, in percent, overall and by kind."""
    if dense is None or compressed is None:
        return None
    return {
        "dense": dense.percent,
        "compressed": compressed.percent,
        "chance": dense.chance,
        "count": dense.count,
        "by_kind": {
            kind: {"dense": percent, "compressed": compressed.by_kind[kind][0], "count": count}
            for kind, (percent, count) in dense.by_kind.items()
        },
    }


def save(options: Namespace, model: Any, tokenizer: Any, content: dict[str, Any]) -> int:
    """Write the compressed model, its tokenizer and its model card; returns the bytes of the weights' files."""
    bundled = options.model == SMOLLM2
    save_compressed(
        model,
        options.output,
        report=content,
        tokenizer=tokenizer,
        base_model=SMOLLM2_SOURCE if bundled else options.model,
        licence=options.licence or (SMOLLM2_LICENCE if bundled else None),
    )
    size = sum(file.stat().st_size for file in Path(options.output).glob("*.safetensors"))
    print(f"Saved to {options.output}: {size / 1e6:.1f} MB of weights")
    return size


def print_report(report: CompressionReport, content: dict[str, Any]) -> None:
    """Print what was done and what it cost."""
    print(f"\n{report}\n")
    for name, value in content["perplexity"].items():
        ratio = value["compressed"] / value["dense"]
        print(f"perplexity of {name}: {value['dense']:.2f} -> {value['compressed']:.2f} ({ratio:.2f} times)")
    if facts := content["facts"]:
        print(
            f"facts recalled: {facts['dense']:.1f} % -> {facts['compressed']:.1f} % of {facts['count']} "
            f"(chance {facts['chance']:.1f} %)"
        )
        for kind, value in facts["by_kind"].items():
            print(f"  {kind}: {value['dense']:.1f} % -> {value['compressed']:.1f} % of {value['count']}")
    print("seconds: " + ", ".join(f"{phase} {value:.0f}" for phase, value in content["seconds"].items()))


if __name__ == "__main__":
    main()
