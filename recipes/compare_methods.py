"""Compare compression methods: same model, same calibration tokens, same budgets, same questions, one command.

The defaults need no data and no network and take some minutes: three methods at one budget, on SmolLM2-135M-Instruct
and the built-in texts and facts.

    python recipes/compare_methods.py

A whole grid, on your own data:

    python recipes/compare_methods.py --calibration a.txt b.txt --windows 64 --methods fasc svd-llm svd magnitude \
        --keep 0.8 0.6 0.4 --rank 0.5 --settings uniform-factors measured-pivot --refit-methods fasc \
        --eval-text news=news.txt --eval-facts facts.jsonl --eval-windows 32 --output comparison

All methods read one pass of statistics, which is kept (`--statistics`). Every cell (a method, a budget, a setting) is
kept when it ends, so a later run computes only the missing cells. Kept results are only used for the same model,
tokenizer, tokens, questions, options and version. After a change of the code itself, delete the folder. A cell that
fails is shown with its reason, and the run continues.

A setting is ALLOCATION-LAYOUT. `uniform-factors` is the form in which most methods were published: one rank per layer
and two factors. `fisher-pivot` spends one budget over all layers by each method's losses in the Fisher metric, with the
smallest storage. `measured-pivot` first corrects these losses on some calibration windows, as FascCallback does.

Studies: `grid` and `kinds` (recall by kind of relation, Table 6 of the FASC paper) come from the same cells.
`sensitivity` compresses each layer alone (Fig. 2); `layers` the fifth of the layers with the highest and with the
lowest rho (Table 7); `thresholds` puts layers above a rho on fasc, the others on svd (Table 8).

The output folder holds results.md, results.csv, results.json, figures, tables of the studies, and the cells.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
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
from fasc_lightning.options import CHEAP_METHOD, Gate
from fasc_lightning.solvers import available_methods
from fasc_lightning.studies.comparison import (
    PRUNERS,
    Budget,
    Cell,
    Evaluation,
    Outcome,
    Setting,
    gate_cells,
    group_cells,
    sensitivity_cells,
    some_facts,
    some_layers,
)

STUDIES = ("grid", "kinds", "sensitivity", "layers", "thresholds")
RHO_STUDIES = frozenset({"layers", "thresholds"})


def build_parser() -> CommandParser:
    """Return the parser of this recipe's options."""
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add_source_options(parser, windows=16)
    everything = ", ".join([*available_methods(), *PRUNERS])
    add("--methods", nargs="+", default=["fasc", "svd-llm", "svd"], help=f"any of {everything}; or all")
    add("--keep", nargs="+", type=float, default=[], help="fractions of the targeted parameters; 0.8 if no budget")
    add("--rank", nargs="+", type=int | float, default=[], help="fractions of full rank (0.5) or ranks (256)")
    add("--settings", nargs="+", default=["measured-pivot"], help="ALLOCATION-LAYOUT, as uniform-factors")
    add("--refit-methods", nargs="*", default=[], help="solvers measured refitted as well, in the last setting")
    add("--gfwsvd-passes", type=int, default=2, help="passes of gfwsvd's iteration beyond the first step")
    add("--minimal-pairs", help="jsonl file of minimal pairs in BLiMP's format, for a column on syntax")
    add("--studies", nargs="+", default=["grid", "kinds"], help=f"any of {', '.join(STUDIES)}")
    add("--study-methods", nargs="+", default=["fasc", "svd"], help="solvers of sensitivity and layers")
    add("--study-rank", type=int | float, default=0.5, help="rank of the other studies' cells")
    add("--study-layers", type=int, help="layers of sensitivity at least, of all kinds and depths; by default all")
    add("--study-windows", type=int, default=4, help="windows of each text when one layer is compressed")
    add("--study-facts", type=int, default=100, help="facts at least when one layer is compressed, by relations")
    add("--thresholds", nargs="+", type=float, default=[0.05, 0.1, 0.2, 0.3], help="of debiased rho")
    add_comparison_options(parser, windows=8, output="comparison")
    return parser


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe and return the content of results.json."""
    start = time.perf_counter()
    options = check(build_parser().parse_args(list(sys.argv[1:] if arguments is None else arguments)))
    run = ComparisonRun(options, "Methods compared", solvers_of(options), share_kept, options.gfwsvd_passes)
    studies = options.studies
    if {"grid", "kinds"} & set(studies):
        dense, outcomes = run.cells("grid", grid_cells(options), run.evaluation)
        if "grid" in studies:
            run.report.grid(dense, outcomes, run.evaluation)
        if "kinds" in studies:
            run.report.kinds(dense, outcomes, run.evaluation)
    scores = run.calibration.scores() if RHO_STUDIES & set(studies) else None
    debiased = {} if scores is None else {name: row["debiased"] for name, row in scores.items()}
    if "sensitivity" in studies:
        few = few_questions(run.evaluation, options)
        chosen = some_layers(run.calibration.layers, options.study_layers)
        cells = sensitivity_cells(chosen, options.study_methods, options.study_rank)
        dense, outcomes = run.cells("sensitivity", cells, few)
        run.report.sensitivity(dense, outcomes, options.study_rank, scores)
    if "layers" in studies:
        cells = group_cells(debiased, options.study_methods, options.study_rank)
        dense, outcomes = run.cells("layers", cells, run.evaluation)
        title = f"Critical and safe layers, each fifth together at rank {options.study_rank:g}"
        note = "Critical are the layers with the highest debiased rho, safe those with the lowest."
        run.report.labelled(title, dense, outcomes, "groups.csv", note)
    if "thresholds" in studies:
        setting, budget = Setting.parse(options.settings[-1]), Budget(rank=options.study_rank)
        thresholds = sorted(options.thresholds)
        cells = gate_cells(debiased, thresholds, "fasc", CHEAP_METHOD, budget, setting)
        dense, outcomes = run.cells("thresholds", cells, run.evaluation)
        note = f"Layers: on fasc. Debiased rho; {setting}; thresholds that choose the same layers stand once."
        run.report.labelled(f"Thresholds of rho, {budget}", dense, outcomes, "thresholds.csv", note)
    run.report.head["seconds"] = {
        **run.calibration.seconds_of(run.comparison.methods),
        "this run": time.perf_counter() - start,
    }
    run.report.head["peak memory of this run (GB)"] = peak_memory_bytes(run.calibration.model.device) / 1e9
    content = run.report.write()
    print(f"\nTables and figures are in {options.output}: {Path(options.output) / 'results.md'}")
    return content


def check(options: Namespace) -> Namespace:
    """Fill in options that depend on others, and refuse invalid ones before anything is loaded.

    Raises:
        ValueError: If an option is out of range.
        FileNotFoundError: If a file is missing.
    """
    if options.methods == ["all"]:
        options.methods = [*available_methods(), *PRUNERS]
    solvers = available_methods()
    for name, known in (
        ("methods", [*solvers, *PRUNERS]),
        ("refit_methods", solvers),
        ("study_methods", solvers),
        ("studies", STUDIES),
    ):
        if unknown := [value for value in options[name] if value not in known]:
            option = name.replace("_", "-")
            raise ValueError(f"Expected --{option} to be of {', '.join(known)} but got {', '.join(unknown)}.")
        if len(set(options[name])) < len(options[name]) or not (options[name] or name == "refit_methods"):
            raise ValueError(f"Expected --{name.replace('_', '-')} to be different names but got {options[name]}.")
    if not options.keep and not options.rank:
        options.keep = [0.8]
    counts = ("study_facts", "study_layers", "study_windows", "eval_windows")
    check_comparison(options, [("gfwsvd_passes", 0), *((name, 1) for name in counts)])
    for threshold in options.thresholds:
        Gate(threshold)  # refuses wrong values
    grid_cells(options)  # refuses unknown budgets and settings
    Budget(rank=options.study_rank)
    return options


def grid_cells(options: Namespace) -> list[Cell]:
    """Return the cells of the grid; a pruner has one cell per budget, whatever the settings.

    The order is by method, because cells of one method that differ only in their budgets share its factorisations.
    """
    budgets = [*(Budget(keep=keep) for keep in options.keep), *(Budget(rank=rank) for rank in options.rank)]
    settings = [Setting.parse(text) for text in options.settings]
    cells = []
    for method in options.methods:
        steps = options.gfwsvd_passes if method == "gfwsvd" else 0
        if method in PRUNERS:
            cells += [Cell(method, budget) for budget in budgets]
        else:
            cells += [
                Cell(method, budget, setting, kronecker_steps=steps) for setting in settings for budget in budgets
            ]
    for method in options.refit_methods:
        steps = options.gfwsvd_passes if method == "gfwsvd" else 0
        cells += [Cell(method, budget, settings[-1], True, steps) for budget in budgets]
    return cells


def few_questions(evaluation: Evaluation, options: Namespace) -> Evaluation:
    """Return some of the questions, for studies with hundreds of cells: whole relations of facts, no minimal pairs."""
    texts = {name: windows[: options.study_windows] for name, windows in evaluation.texts.items()}
    facts = some_facts(evaluation.facts, options.study_facts, Random(options.seed))
    return replace(evaluation, texts=texts, facts=facts, pairs=[])


def solvers_of(options: Namespace) -> list[str]:
    """Return the solvers of all studies' cells."""
    grid = [*options.methods, *options.refit_methods] if {"grid", "kinds"} & set(options.studies) else []
    solvers = [method for method in dict.fromkeys(grid) if method not in PRUNERS]
    if {"sensitivity", "layers"} & set(options.studies):
        solvers += options.study_methods
    if "thresholds" in options.studies:
        solvers += ["fasc", CHEAP_METHOD]
    return solvers


def share_kept(outcome: Outcome, dense: Outcome) -> str:
    """Return the share of the parameters that an outcome keeps."""
    del dense
    return f"kept {outcome.kept:.1%}"


if __name__ == "__main__":
    run_program(main)
