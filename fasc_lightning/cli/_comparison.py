"""The parts that recipes of comparisons share: options, questions, and a run with its report."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from fasc_lightning._utils import fingerprint, library_versions, require, terminal_progress
from fasc_lightning.cli._models import device_of
from fasc_lightning.cli._options import add_text_options, check_least, say_missing_facts
from fasc_lightning.cli._run import calibration_of, questions_of
from fasc_lightning.data import check_file, check_sources, load_model, named_files
from fasc_lightning.layers import select_layers

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from fasc_lightning.studies.comparison import Cell, Evaluation, Outcome


def add_comparison_options(parser: ArgumentParser, windows: int, output: str) -> None:
    """Add the options for the questions, the seed and the places of a comparison.

    Args:
        parser: Parser of a recipe.
        windows: Default number of windows of each evaluation text.
        output: Default folder of the results.
    """
    add = parser.add_argument
    add_text_options(parser, windows)
    add("--eval-facts", help="jsonl file with subject, relation, template, object, kind")
    add(
        "--eval-precision", default="highest", help="of float32 products in reading texts: highest, high, medium (bf16)"
    )
    add("--seed", type=int, default=0, help="of sampling, shuffling, permutations and bootstrap intervals")
    add("--output", default=output, help="folder for rows, tables and figures")
    add("--statistics", help="folder for statistics; by default one in the output folder")
    add("--device", help="default: cuda if there is one")


def check_comparison(options: Namespace, least: Iterable[tuple[str, int]]) -> None:
    """Refuse invalid options of :func:`add_comparison_options`; ``eval_text`` becomes files by name.

    Args:
        options: The options.
        least: Names of counts, each with the smallest number that it may be.

    Raises:
        ValueError: If an option is out of range.
        FileNotFoundError: If a file is missing.
        ModuleNotFoundError: If an optional package is missing.
    """
    from fasc_lightning.studies.comparison import Precision

    check_least(options, dict(least))
    check_sources(options.calibration, "calibration")
    require("The figures of a comparison need", "plot", "matplotlib")
    precisions = get_args(Precision)
    if options.eval_precision not in precisions:
        raise ValueError(
            f"Expected --eval-precision to be one of {', '.join(precisions)} but got {options.eval_precision!r}."
        )
    options.eval_text = named_files(options.eval_text)
    given = [path for path in (options.eval_facts, options.get("minimal_pairs")) if path]
    for path in given:
        check_file(path)
    if not given:
        say_missing_facts(options)


def evaluation_of(options: Namespace, tokenizer: Any) -> Evaluation:
    """Return the questions: the user's, or the built-in text and facts if there are none."""
    from fasc_lightning.studies.comparison import Evaluation

    asked = questions_of(options, tokenizer)
    if asked.pairs and not (options.eval_text or options.eval_facts):
        asked = replace(asked, texts={}, facts=())
    compared = min(asked.compared, options.eval_windows) if asked.texts else 0
    return Evaluation(asked.texts, asked.facts, asked.pairs, options.eval_precision, compared=compared)


class ComparisonRun:
    """One run of a comparison: the model, its statistics, the questions and the report.

    Args:
        options: The checked options of the recipe.
        title: Title of the report.
        solvers: Solvers of the cells.
        share: Returns the size of an outcome in words, beside the dense model's outcome.
        passes: Passes of gfwsvd's iteration beyond the first step.
        head: Further entries of the report's head.
    """

    def __init__(
        self,
        options: Namespace,
        title: str,
        solvers: Sequence[str],
        share: Callable[[Outcome, Outcome], str],
        passes: int = 0,
        head: Mapping[str, Any] | None = None,
    ) -> None:
        import torch

        from fasc_lightning.studies.comparison import Comparison, GatheredStatistics, Report

        self.output = Path(options.output)
        self._share = share
        device = device_of(options.device)
        model, tokenizer = load_model(options.model)
        model.eval().requires_grad_(False).to(device)
        self.evaluation = evaluation_of(options, tokenizer)
        self.calibration = GatheredStatistics(
            model,
            tokenizer,
            select_layers(model),
            calibration_of(options, tokenizer, model),
            Path(options.statistics or self.output / "statistics"),
            passes,
            options.seed,
            progress=sys.stderr.isatty(),
        )
        self.comparison = Comparison(self.calibration, list(solvers))
        asked = [f"{options.eval_windows} windows of each text", f"{len(self.evaluation.facts)} facts"]
        if self.evaluation.compared:
            asked.insert(1, f"KL on the first {self.evaluation.compared}")
        if self.evaluation.pairs:
            asked.append(f"{len(self.evaluation.pairs)} minimal pairs")
        content = {
            "model": options.model,
            "calibration": f"{options.windows} windows of {options.window} tokens of {', '.join(options.calibration)}",
            "evaluation": f"{', '.join(asked)}; texts read in {options.eval_precision} precision of products",
            **(head or {}),
            "seed": options.seed,
            "threads": torch.get_num_threads(),
            "versions": library_versions(),
            "options": {name: value for name, value in options.as_dict().items() if value is not None},
        }
        self.report = Report(self.output, title, content, options.seed)

    def cells(self, study: str, cells: Sequence[Cell], evaluation: Evaluation) -> tuple[Outcome, dict[Cell, Outcome]]:
        """Measure the dense model and a study's cells, print one line each, and return both.

        Args:
            study: Name of the study, whose cells share a folder.
            cells: The cells.
            evaluation: The questions.

        Raises:
            RuntimeError: If the dense model cannot be measured, because there is then no comparison.
        """
        from fasc_lightning.studies.comparison import CellStore

        context = fingerprint(self.calibration.source, evaluation.fingerprint())
        store = CellStore(self.output / "cells" / study, context)
        line = partial(cell_line, share=self._share)
        return self.comparison.run_beside_dense(
            cells, evaluation, store, line, partial(print, flush=True), terminal_progress
        )


def cell_line(cell: Cell, outcome: Outcome, dense: Outcome, share: Callable[[Outcome, Outcome], str]) -> str:
    """Return one line about a cell."""
    from fasc_lightning.studies.comparison import metrics_of

    if outcome.measured is None:
        return f"{cell.name}: failed, {outcome.reason}"
    figures = [f"{m.name} {m.shown(m.value(outcome.measured))}" for m in metrics_of(outcome.measured)]
    figures += [f"{name} {value:.0f} tokens/s" for name, value in outcome.measured.speed.items()]
    figures += [outcome.refit_verdict] if outcome.refit else []
    seconds = sum(outcome.seconds.values())
    return f"{cell.name}: {share(outcome, dense)}, {', '.join(figures)}, {seconds:.0f} s"
