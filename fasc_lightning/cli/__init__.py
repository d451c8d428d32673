"""The command ``fasc`` and the shared parts of the recipes: options, results, output, and the entry of a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fasc_lightning._run_fit import on_device, run_fit
from fasc_lightning._utils import (
    COLOURS,
    DASHES,
    GREY,
    MARKERS,
    Clock,
    Row,
    fingerprint,
    library_versions,
    mapping,
    markdown_table,
    new_figure,
    peak_memory_bytes,
    plain,
    read_json,
    require,
    return_freed_memory,
    save_table,
    table_text,
    terminal_progress,
    tokenizer_fingerprint,
    whole_file,
    write_json,
)
from fasc_lightning.cli._comparison import ComparisonRun, add_comparison_options, check_comparison
from fasc_lightning.cli._evaluate import main as evaluate_main
from fasc_lightning.cli._models import Dtype, add_dtype_option, device_of, dtype_of
from fasc_lightning.cli._options import (
    DATA,
    add_compression_options,
    add_evaluation_options,
    add_output_options,
    add_source_options,
    add_text_options,
    check_run,
    compression_options,
    frozen_options,
)
from fasc_lightning.cli._plan import main as plan_main
from fasc_lightning.cli._precision import AUTO, calibration_precision
from fasc_lightning.cli._program import CommandParser, run_program
from fasc_lightning.cli._run import (
    KERNEL_CACHE,
    calibration_of,
    measurement_lines,
    measurements,
    perplexity_line,
    quality_line,
    questions_of,
    save_results,
    saving,
)
from fasc_lightning.cli._score import main as score_main

#: The programs behind ``fasc`` that are no recipes, by their command.
PROGRAMS: dict[str, Callable[[Sequence[str] | None], Any]] = {
    "evaluate": evaluate_main,
    "plan": plan_main,
    "score": score_main,
}

__all__ = [
    "AUTO",
    "COLOURS",
    "DATA",
    "DASHES",
    "GREY",
    "KERNEL_CACHE",
    "MARKERS",
    "PROGRAMS",
    "Clock",
    "CommandParser",
    "ComparisonRun",
    "Dtype",
    "Row",
    "add_comparison_options",
    "add_compression_options",
    "add_dtype_option",
    "add_evaluation_options",
    "add_output_options",
    "add_source_options",
    "add_text_options",
    "calibration_of",
    "calibration_precision",
    "check_comparison",
    "check_run",
    "compression_options",
    "device_of",
    "dtype_of",
    "fingerprint",
    "frozen_options",
    "library_versions",
    "mapping",
    "markdown_table",
    "measurement_lines",
    "measurements",
    "new_figure",
    "on_device",
    "peak_memory_bytes",
    "perplexity_line",
    "plain",
    "quality_line",
    "questions_of",
    "read_json",
    "require",
    "return_freed_memory",
    "run_fit",
    "run_program",
    "save_results",
    "save_table",
    "saving",
    "table_text",
    "terminal_progress",
    "tokenizer_fingerprint",
    "whole_file",
    "write_json",
]
