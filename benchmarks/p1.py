"""The P1 benchmark: perplexity and facts of SmolLM2-135M-Instruct at several budgets.

    FASC_DATA=<folder with the texts> python benchmarks/p1.py --output benchmarks/results

Each row is one run of recipes/compress.py in a process of its own, saved as JSON when it ends. Existing rows are not
run again (delete their files after a change of the code). The table is printed as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fasc_lightning.cli import whole_file

RECIPE = Path(__file__).parents[1] / "recipes" / "compress.py"
CALIBRATION = ("calib_wikitext2_train.txt", "calib_wikipedia_exllama.txt", "calib_c4_realnews.txt")
TEXTS = {"wikitext2": "wikitext2_valid.txt", "c4": "calib_c4_exllamav3.txt"}
FACTS = "facts_p1.jsonl"

#: Options of the recipe for each row.
ROWS = {
    "keep0.8": ["--keep", "0.8"],
    "keep0.6": ["--keep", "0.6"],
    "keep0.4": ["--keep", "0.4"],
    "rank0.5": ["--rank", "0.5"],
    "keep0.8-without-refit": ["--keep", "0.8", "--refit", "false"],
    "keep0.6-without-refit": ["--keep", "0.6", "--refit", "false"],
    "rank0.5-svd-llm-uniform-factors": (
        ["--rank", "0.5", "--method", "svd-llm", "--allocation", "uniform", "--layout", "factors", "--refit", "false"]
    ),
    "keep0.8-256-windows": ["--keep", "0.8", "--windows", "256"],
    "keep0.6-256-windows": ["--keep", "0.6", "--windows", "256"],
}


def text_options(data: Path) -> list[str]:
    """Return the options of a recipe for the texts of P1."""
    calibration = ["--calibration", *(str(data / file) for file in CALIBRATION)]
    return [*calibration, "--eval-text", *(f"{key}={data / file}" for key, file in TEXTS.items())]


def run_row(name: str, options: list[str], data: Path, output: Path) -> dict[str, Any]:
    """Run one row unless its report exists, and return the report."""
    path = output / f"{name}.json"
    if not path.exists():
        command = [sys.executable, str(RECIPE), *options, "--report", str(path)]
        command += [*text_options(data), "--eval-facts", str(data / FACTS)]
        subprocess.run(command, check=True)
    return json.loads(path.read_text())


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| row | kept | WikiText-2 valid | C4 (other domain) | facts % | seconds | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for number, (name, report) in enumerate(reports.items()):
        perplexity, facts = report["perplexity"], report["facts"]
        if number == 0:
            dense = " | ".join(f"{perplexity[key]['dense']:.2f}" for key in TEXTS)
            lines.append(f"| dense | 100 % | {dense} | {facts['dense']:.1f} | | |")
        parameters = report["targeted"]["parameters"]
        cells = " | ".join(
            f"{perplexity[key]['compressed']:.2f} ({perplexity[key]['compressed'] / perplexity[key]['dense']:.2f}x)"
            for key in TEXTS
        )
        recalled = f"{facts['compressed']:.1f} ({100 * facts['compressed'] / facts['dense']:.0f} %)"
        seconds = sum(report["seconds"][phase] for phase in ("calibrate", "factorize", "swap"))
        lines.append(
            f"| {name} | {100 * parameters['compressed'] / parameters['dense']:.1f} % | {cells} | {recalled} | "
            f"{seconds:.0f} | {report['peak_memory_bytes'] / 1e9:.1f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all rows, or the named ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    options = parser.parse_args(arguments)
    folder = os.environ.get("FASC_DATA")
    if folder is None or not (Path(folder) / FACTS).exists():
        sys.exit(f"Expected FASC_DATA to name the folder that holds {FACTS} and the texts, but it is {folder!r}.")
    options.output.mkdir(parents=True, exist_ok=True)
    reports = {name: run_row(name, ROWS[name], Path(folder), options.output) for name in options.rows}
    text = table(reports)
    with whole_file(options.output / "p1.md") as temporary:
        temporary.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
