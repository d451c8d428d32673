"""Predicted and measured peak memory of compressions of SmolLM2-135M-Instruct, each in a process of its own.

    python benchmarks/peak.py --output benchmarks/results

The predicted peak comes from ``compress(..., dry_run=True)``. The measured peak is the largest memory of the process
that is not of mapped files (several passes map finished factors from the disk), minus the memory of the interpreter and
its libraries before the model was loaded. It needs Linux. Tokens are random, because memory does not depend on them.
Existing rows of the output are not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import anonymous, run_alone, warm_up, watched
from pages import write_part

from fasc_lightning import compress
from fasc_lightning.cli import markdown_table, write_json
from fasc_lightning.data import load_model
from fasc_lightning.planning import CompressionForecast

#: Options of each row, without a refit because a plan does not count it.
ROWS: dict[str, dict[str, Any]] = {
    "whole": {},
    "projected": {"sketch": "projected"},
    "4 passes": {"passes": 4},
    "svd-llm": {"method": "svd-llm"},
}


def measure(
    options: dict[str, Any], windows: int, window: int, make: Callable[[], Any] | None = None
) -> dict[str, Any]:
    """Compress in this process, and return predicted and measured memory.

    Args:
        options: Options of the compression.
        windows: Number of batches.
        window: Tokens of each batch.
        make: Returns the model; None for SmolLM2-135M-Instruct.
    """
    warm_up()
    before = anonymous()
    model = load_model("smollm2")[0] if make is None else make()
    for parameter in model.parameters():  # loaded ones are mapped from their file
        parameter.data = parameter.data.clone()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (windows, 1, window), generator=generator)
    batches = [{"input_ids": part, "labels": part} for part in ids]
    options = {"keep": 0.6, "refit": False, "progress": False, **options}
    predicted = compress(model, batches, dry_run=True, **options)
    assert isinstance(predicted, CompressionForecast)
    loaded = anonymous()
    with watched() as peak:
        report = compress(model, batches, **options)
    return {
        "before": before,
        "loaded": loaded,
        "peak": peak(),
        "predicted": predicted.peak.device,
        "parts": predicted.parts,
        "moments": report.moments_bytes,
        "seconds": report.seconds,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    return markdown_table(
        [
            {
                "moments": name,
                "GB of moments": f"{row['moments'] / 1e9:.2f}",
                "predicted peak": f"{row['predicted'] / 1e9:.2f}",
                "measured": f"{_own(row) / 1e9:.2f}",
                "measured over predicted": f"{_own(row) / row['predicted']:.2f}",
            }
            for name, row in rows.items()
        ]
    )


def _own(row: dict[str, Any]) -> int:
    return row["peak"] - row["before"]


def main() -> None:
    """Measure the missing rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--write", type=Path, help="page whose generated part is replaced")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--row", choices=list(ROWS), help="measure this one in this process")
    arguments = parser.parse_args()
    if arguments.row is not None:
        print(json.dumps(measure(ROWS[arguments.row], arguments.windows, arguments.window)))
        return
    path = arguments.output / "peak.json"
    rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in ROWS:
        if name not in rows:
            sizes = ["--windows", str(arguments.windows), "--window", str(arguments.window)]
            rows[name] = run_alone(__file__, ["--row", name, *sizes])
            write_json(rows, path)
    text = table(rows)
    (arguments.output / "peak.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if arguments.write is not None:
        write_part(arguments.write, "peak.py", text)


if __name__ == "__main__":
    main()
