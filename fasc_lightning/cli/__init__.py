"""What the recipes share: their options, and what they save and print."""

from fasc_lightning.cli._options import (
    add_compression_options,
    add_evaluation_options,
    add_output_options,
    add_source_options,
    add_text_options,
    check_run,
    compression_options,
)
from fasc_lightning.cli._run import (
    KERNEL_CACHE,
    calibration_of,
    measurement_lines,
    perplexity_line,
    questions_of,
    save_results,
)

__all__ = [
    "KERNEL_CACHE",
    "add_compression_options",
    "add_evaluation_options",
    "add_output_options",
    "add_source_options",
    "add_text_options",
    "calibration_of",
    "check_run",
    "compression_options",
    "measurement_lines",
    "perplexity_line",
    "questions_of",
    "save_results",
]
