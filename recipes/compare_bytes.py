"""Compare models at equal bytes: bits, ranks and other programs' models, same tokens, same questions, one command.

The defaults need no data and no network and take some minutes a row, on SmolLM2-135M-Instruct and the built-in text
and facts: five sizes with bits chosen layer by layer, and three with low rank.

    python recipes/compare_bytes.py

On your own data, with uniform bits as controls and beside models that other programs compressed:

    python recipes/compare_bytes.py --calibration a.txt b.txt --windows 64 --sizes 0.52 0.27 0.21 int8 int4 int3 \
        nearest-int4 --keep 0.8 0.6 --peers hqq-4 gptqmodel-4 --eval-text news=news.txt --eval-facts facts.jsonl \
        --eval-windows 32 --output bytes

A size is the share of the targeted layers' bytes in 16 bits. `int4` gives all layers 4 bits in groups of 64 (`int4/32`
in groups of 32), and `nearest-int4` does so without the calibration. A peer is a folder of transformers with
dequantised weights and a peer.json that states its bytes (benchmarks/peers).

All rows of this package read one pass of statistics, which is kept (`--statistics`). Every row is kept when it ends, so
a later run computes only the missing rows. Kept results are only used for the same model, tokenizer, tokens, questions,
options and version. After a change of the code itself, delete the folder. A row that fails is shown with its reason,
and the run continues.

`--speed` measures prefill and decoding of the dense model and of models with bits. It builds each of them again, so
that the quality of a row can be measured on a busy machine and its speed later on a quiet one.

The output folder holds results.md, results.csv, results.json, a figure, and the rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from fasc_lightning.cli import (
    CommandParser,
    ComparisonRun,
    add_comparison_options,
    add_source_options,
    check_comparison,
    peak_memory_bytes,
    run_program,
)
from fasc_lightning.layers import bytes_in_16_bits
from fasc_lightning.studies.comparison import (
    DENSE,
    FOLDER,
    Budget,
    Cell,
    Evaluation,
    Outcome,
    Setting,
    read_peer,
)

#: The method of all rows of this package; its moments measure the loss of ranks and of bits.
METHOD = "fasc"

#: Rows that may be refitted, and what marks a single one.
REFITTED, REFIT = ("sizes", "keep"), "+refit"


def build_parser() -> CommandParser:
    """Return the parser of this recipe's options."""
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add_source_options(parser, windows=16)
    add(
        "--sizes",
        nargs="*",
        type=float | str,
        default=[0.52, 0.29, 0.27, 0.21, 0.15],
        help="shares of the bytes in 16 bits, or int8, int4, int3, int2 for the same bits in all layers",
    )
    add(
        "--keep",
        nargs="*",
        type=float | str,
        default=[0.8, 0.6, 0.4],
        help="shares of the parameters, as low rank; 0.8+int8 also rounds them to int8",
    )
    add("--setting", default="measured-pivot", help="ALLOCATION-LAYOUT of bits and ranks, as fisher-factors")
    add(
        "--refit",
        nargs="*",
        default=["keep"],
        help="rows to refit, of sizes and keep; none to the nearest. One row alone is 0.21+refit",
    )
    add("--peers", nargs="*", default=[], help="folders of models that other programs compressed")
    add("--kl-windows", type=int, default=8, help="windows of each text for KL to the dense model; 0 for none")
    add("--speed", action="store_true", help="measure prefill and decoding in bfloat16; best on a quiet machine")
    add_comparison_options(parser, windows=8, output="bytes")
    return parser


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe and return the content of results.json."""
    start = time.perf_counter()
    options = check(build_parser().parse_args(list(sys.argv[1:] if arguments is None else arguments)))
    head = {"setting": options.setting}
    run = ComparisonRun(options, "Models at equal bytes", [METHOD], share_of_bytes, head=head)
    dense, outcomes = run.cells("models", cells_of(options), run.evaluation)
    speeds: dict[Cell, dict[str, float]] = {}
    if options.speed:
        prompt = Evaluation({}, [], prompt=run.calibration.windows[:1])
        timed = [cell for cell in outcomes if has_bits(cell)]
        dense_speed, found = run.cells("speed", timed, prompt)
        measured = {Cell(DENSE): dense_speed, **found}
        speeds = {cell: outcome.measured.speed for cell, outcome in measured.items() if outcome.measured is not None}
    model = run.calibration.model
    calibration = run.calibration.seconds_of([METHOD]).get("pass", 0.0)
    rest = bytes_in_16_bits(model.parameters()) - dense.bytes
    run.report.by_bytes(dense, outcomes, run.evaluation, rest, calibration, speeds)
    run.report.head["seconds"] = {"pass over the calibration": calibration, "this run": time.perf_counter() - start}
    run.report.head["peak memory of this run (GB)"] = peak_memory_bytes(model.device) / 1e9
    content = run.report.write()
    print(f"\nTables and the figure are in {options.output}: {Path(options.output) / 'results.md'}")
    return content


def check(options: Namespace) -> Namespace:
    """Fill in options that depend on others, and refuse invalid ones before anything is loaded.

    Raises:
        ValueError: If an option is out of range.
        FileNotFoundError: If a file is missing.
    """
    if unknown := [name for name in options.refit if name not in REFITTED]:
        raise ValueError(f"Expected --refit to be of {', '.join(REFITTED)} but got {', '.join(unknown)}.")
    check_comparison(options, [("windows", 1), ("window", 2), ("eval_windows", 1), ("kl_windows", 0)])
    cells = cells_of(options)  # refuses unknown budgets and settings
    if not cells:
        raise ValueError("Expected --sizes, --keep or --peers to compare with the dense model but got none.")
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Expected different rows, and folders of different names, but {', '.join(twice)} is twice.")
    for folder in options.peers:
        read_peer(folder)
    return options


def cells_of(options: Namespace) -> list[Cell]:
    """Return the cells: sizes first, because they share one rounding to all grids, then uniform bits, ranks, peers."""
    setting = Setting.parse(options.setting)

    def cell(text: str, parse: Callable[[str], Budget], group: str) -> Cell:
        budget = parse(text.removesuffix(REFIT))
        refit = group in options.refit or text.endswith(REFIT)
        return Cell(METHOD, budget, setting, refit=refit and not budget.rounds_to_nearest)

    sizes = [cell(f"{text}", Budget.parse, "sizes") for text in options.sizes]
    sizes.sort(key=lambda found: found.budget is None or found.budget.size is None)
    ranks = [cell(f"{text}", Budget.parse_keep, "keep") for text in options.keep]
    return [*sizes, *ranks, *(Cell(FOLDER, label=str(folder)) for folder in options.peers)]


def has_bits(cell: Cell) -> bool:
    """Return whether a cell's layers have few bits in the form that this package runs, each form once."""
    return cell.budget is not None and cell.budget.options.rounds and not cell.budget.rounds_to_nearest


def share_of_bytes(outcome: Outcome, dense: Outcome) -> str:
    """Return the bytes of an outcome as a share of the dense model's."""
    return f"{outcome.bytes / dense.bytes:.1%} of the bytes"


if __name__ == "__main__":
    run_program(main)
