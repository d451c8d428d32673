"""Shared steps of the recipes: loading data, saving the model, printing results."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_module

from fasc_lightning._run_fit import NOT_SAVED
from fasc_lightning._utils import write_json
from fasc_lightning.cli._options import TEXT_SIZE, missing_facts
from fasc_lightning.data import SMOLLM2, SMOLLM2_LICENCE, SMOLLM2_SOURCE, calibration_windows, text_windows
from fasc_lightning.evaluation import (
    BUILTIN_TEXT,
    HELD_OUT,
    Quality,
    Questions,
    builtin_text,
    compare_divergence,
    compare_facts,
    compare_pairs,
    compare_perplexity,
    load_minimal_pairs,
)
from fasc_lightning.models import save_compressed

if TYPE_CHECKING:
    from jsonargparse import Namespace
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Environment for processes that train or run compressed models in bfloat16 on a CPU, to set before their first
#: product. Layers have different ranks, so a step takes more kernels than the 1,024 that oneDNN caches by default, and
#: oneDNN would compile each of them again and again.
KERNEL_CACHE = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16384"}


def questions_of(options: Namespace, tokenizer: PreTrainedTokenizerBase) -> Questions:
    """Return the questions to a model that the options of a recipe select.

    The built-in facts are left out if their package is missing.
    """
    if missing_facts(options):
        found = Questions({BUILTIN_TEXT: text_windows(builtin_text(), tokenizer, options.eval_windows, options.window)})
    else:
        found = Questions.load(
            options.eval_text,
            options.eval_facts,
            tokenizer,
            windows=options.eval_windows,
            window=options.window,
            seed=options.seed,
        )
    pairs = load_minimal_pairs(options.minimal_pairs) if options.get("minimal_pairs") else ()
    return replace(found, pairs=pairs, compared=options.get("kl_windows", 0))


def calibration_of(options: Namespace, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> Tensor:
    """Return the calibration windows of a recipe's options, (windows, window).

    A recipe that calibrates in bfloat16 samples text in bfloat16.
    """
    return calibration_windows(
        options.calibration,
        tokenizer,
        windows=options.windows,
        window=options.window,
        seed=options.seed,
        model=model,
        dtype=torch.bfloat16 if options.get("precision") == "bf16-mixed" else None,
    )


@contextmanager
def saving() -> Iterator[None]:
    """Leave out the line of a compression that the model is not saved yet: the program inside saves it."""

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(NOT_SAVED)

    logger = rank_zero_module.log  # another one after an import of `pytorch_lightning`
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def save_results(options: Namespace, model: Any, tokenizer: Any, content: dict[str, Any]) -> str:
    """Write the compressed model with its tokenizer and card to --output, and the report to --report.

    Args:
        options: Options of the recipe.
        model: The compressed model.
        tokenizer: Its tokenizer.
        content: The report; "saved_bytes" of the weights' files is added to it.

    Returns:
        Lines for the user that name the saved files and the next command.
    """
    saved = "No model was saved: --output names a folder for it."
    bundled = options.model == SMOLLM2
    try:
        if options.output:
            save_compressed(
                model,
                options.output,
                report=content,
                tokenizer=tokenizer,
                base_model=SMOLLM2_SOURCE if bundled else options.model,
                licence=options.licence or (SMOLLM2_LICENCE if bundled else None),
            )
            content["saved_bytes"] = sum(file.stat().st_size for file in Path(options.output).glob("*.safetensors"))
            saved = (
                f"Saved to {options.output}: {content['saved_bytes'] / 1e6:.1f} MB of weights\n"
                f"Next: {evaluate_command(options)}"
            )
    finally:  # a full disk must not cost the figures as well
        if options.report:
            write_json(content, options.report)
    return saved


def evaluate_command(options: Namespace) -> str:
    """Return the command that evaluates the saved model on a recipe's questions."""
    words = ["fasc", "evaluate", options.output]
    if options.eval_text:
        words += ["--eval-text", *(f"{name}={path}" for name, path in options.eval_text.items())]
    if options.eval_facts:
        words += ["--eval-facts", options.eval_facts]
    for name, default in TEXT_SIZE.items():
        if options[name] != default:
            words += [f"--{name.replace('_', '-')}", f"{options[name]}"]
    return shlex.join(words)


def measurements(states: Mapping[str, Quality]) -> dict[str, Any]:
    """Return the part of a report that compares a model's states, the dense one first."""
    return {
        "perplexity": compare_perplexity(states),
        "facts": compare_facts(states),
        "kl": compare_divergence(states),
        "minimal_pairs": compare_pairs(states),
    }


def measurement_lines(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a report on perplexity, facts and time, state by state."""
    for name, values in content["perplexity"].items():
        yield perplexity_line(name, values)
    yield from facts_lines(content["facts"])
    yield from divergence_lines(content["kl"])
    yield from pairs_lines(content["minimal_pairs"])
    yield "seconds: " + ", ".join(f"{phase} {value:.0f}" for phase, value in content["seconds"].items())


def facts_lines(facts: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the lines on factual recall, state by state; none without facts."""
    if not facts:
        return
    yield f"facts recalled: {_percentages(facts)} of {facts['count']} (chance {facts['chance']:.1f} %)"
    for kind, values in facts["by_kind"].items():
        yield f"  {kind}: {_percentages(values)} of {values['count']}"


def divergence_lines(found: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield a line for each text on the divergence of each state from the first one."""
    for name, values in (found or {}).items():
        nats = " -> ".join(f"{value:.3f}" for value in values.values())
        yield f"KL to the dense model on {name}: {nats} nats a token"


def pairs_lines(found: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield the line on minimal pairs, state by state; none without pairs."""
    if found:
        chance = f"chance {found['chance']:.0f} %"
        yield f"minimal pairs in the right order: {_percentages(found)} of {found['count']} ({chance})"


def quality_line(found: Quality) -> str:
    """Return a line with the figures of one state, to print while other states are still to come."""
    parts = [f"perplexity of {name} {value:.2f}" for name, value in found.perplexity.items()]
    if found.heldout is not None:
        parts.append(f"of {HELD_OUT} data {found.heldout:.2f}")
    if found.facts is not None:
        parts.append(f"facts recalled {found.facts.percent:.1f} % of {found.facts.count}")
    if found.divergence is not None:
        parts += [f"KL on {name} {value:.3f}" for name, value in found.divergence.items()]
    if found.pairs is not None:
        parts.append(f"minimal pairs {found.pairs.percent:.1f} %")
    return f"  {', '.join(parts)}"


def perplexity_line(name: str, values: Mapping[str, float]) -> str:
    """Return a line with the perplexity of a text in each state, and its ratios to the first state."""
    first, *others = values.values()
    times = ", ".join(f"{value / first:.2f}" for value in others)
    return f"perplexity of {name}: " + " -> ".join(f"{value:.2f}" for value in values.values()) + f" ({times} times)"


def _percentages(values: Mapping[str, Any]) -> str:
    """Return the percentages of the states; a comparison's other entries are no states."""
    others = ("chance", "count", "by_kind", "by_phenomenon")
    return " -> ".join(f"{value:.1f} %" for state, value in values.items() if state not in others)
