"""Study rho on a model: its profile, its predictions, the tokens that it needs, and the cost of a gate on it.

One pass over the calibration windows feeds five studies, each with a table, a CSV file and mostly a figure:

* profile: rho by depth and kind of layer, with nulls and intervals (FASC, Fig. 3);
* gains: rho against the gain of fasc over svd, predicted and on held-out windows (Fig. 4);
* angles: principal angles between the inputs that the two solvers keep, for high and low rho (Fig. 5);
* sizes: rho and its interval on 1,024 to 16,384 tokens, and correlations between sizes (Appendix E);
* gate: fasc above a threshold, svd below: layers, perplexity, seconds (Table 8).

The defaults need no data and no network. A smaller run:

    python recipes/study_rho.py --calibration a.txt --windows 16 --studies profile sizes --output study

Three scores are compared. `pooled` is the paper's Eq. 2 on all tokens. `rho` is the mean over minibatches of up to
2,048 tokens, as in monitoring; smaller minibatches give higher values. `debiased` estimates the same without this bias.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from torch import Tensor, nn

from fasc_lightning import FascCallback
from fasc_lightning.cli import (
    CommandParser,
    Row,
    add_source_options,
    add_text_options,
    device_of,
    library_versions,
    peak_memory_bytes,
    require,
    return_freed_memory,
    run_program,
    save_table,
    table_text,
    write_json,
)
from fasc_lightning.compression import choose_methods, compress_layers, failure_flags
from fasc_lightning.data import calibration_windows, check_sources, file_windows, load_model, named_files, text_windows
from fasc_lightning.dependence import (
    RhoHistory,
    angles_figure,
    check_emergence_options,
    rho_gain_scatter,
    rho_profile,
    save_figure,
)
from fasc_lightning.evaluation import builtin_text, perplexity
from fasc_lightning.hooks import Taps
from fasc_lightning.layers import layer_shapes, layer_sizes, linear_weight, resolve_rank, select_layers, swap_modules
from fasc_lightning.options import CHEAP_METHOD, GATE_BY, Gate
from fasc_lightning.statistics import CalibrationMoments
from fasc_lightning.studies.rho import (
    SCORES,
    HeldoutLosses,
    LayerComparison,
    Observation,
    angles_table,
    backward_windows,
    compare_layer,
    correlations_table,
    divisions,
    gains_table,
    gather,
    layer_row,
    log_ratio,
    profile_table,
    size_correlations,
    sizes_table,
)

STUDIES = ("profile", "gains", "angles", "sizes", "gate")
SIZES = (1024, 2048, 4096, 8192, 16384)
#: Named fasc in all tables: the solution for independent x and h, because rho measures their dependence.
METHOD = "fasc-plain"


def build_parser() -> CommandParser:
    """Return the parser of this recipe's options."""
    parser = CommandParser(__doc__)
    add = parser.add_argument
    add_source_options(parser, windows=64)
    add("--heldout-windows", type=int, default=16, help="more windows of the same texts, to measure gains on")
    add("--rank", type=int | float, default=0.5, help="fraction of full rank (0.5) or absolute rank (256)")
    add("--allocation", default="fisher", choices=["fisher", "uniform"], help="of the gate's budget over layers")
    add("--studies", nargs="+", default=list(STUDIES), help=f"any of {', '.join(STUDIES)}")
    add("--thresholds", nargs="+", type=float, default=[0.05, 0.1, 0.2, 0.3, 0.4, 0.5], help="gates to compare")
    add("--gate-by", default="debiased", choices=list(GATE_BY), help="which score the gate goes by")
    add("--gate-exclude", help="layers that svd serves whatever their score: a regular expression, or paper")
    add("--rho-threshold", type=float, default=0.3, help="divides high from low rho in figures and angles")
    add_text_options(parser, windows=32)
    add("--seed", type=int, default=0, help="of sampling, shuffling and permutations")
    add("--output", default="rho_study", help="folder for tables and figures")
    add("--report", help="JSON file with all results; by default report.json in the output folder")
    add("--device", help="default: cuda if there is one")
    return parser


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the recipe and return the report that it writes."""
    options = check(build_parser().parse_args(list(sys.argv[1:] if arguments is None else arguments)))
    output, studies, clock = Path(options.output), options.studies, Stopwatch()
    device = device_of(options.device)
    report: dict[str, Any] = {"model": options.model, "options": options.as_dict(), "versions": library_versions()}

    model, tokenizer = load_model(options.model)
    model.eval().requires_grad_(False).to(device)
    layers = select_layers(model)
    ranks = uniform_ranks(layers, options.rank)
    texts = evaluation_texts(options, tokenizer) if "gate" in studies else {}
    clock.lap("load")
    windows = calibration_windows(
        options.calibration,
        tokenizer,
        windows=options.windows + options.heldout_windows,
        window=options.window,
        seed=options.seed,
        model=model,
    )
    calibration, heldout = windows.split([options.windows, options.heldout_windows])
    clock.lap("data")

    print(f"Gathering statistics of {len(layers)} layers over {calibration.numel():,} tokens")
    sizes = SIZES if "sizes" in studies else ()
    statistics = gather(model, layers, calibration, sizes, options.seed, progress=sys.stderr.isatty())
    observed = statistics.observed[calibration.numel()]
    flags = failure_flags(layers, statistics.moments)
    clock.lap("statistics")

    compared: dict[str, LayerComparison] = {}
    measured: dict[str, dict[str, float]] = {name: {} for name in layers}
    if {"gains", "angles"} & set(studies):
        compared = compare_layers(layers, statistics.moments, ranks, keep_weights="gains" in studies)
        for name, comparison in compared.items():
            measured[name]["predicted_gain"] = comparison.gain
            measured[name]["median_angle"] = float(comparison.angles.median())
        clock.lap("compare")
    if "gains" in studies:
        for name, gain in heldout_gains(model, layers, compared, heldout).items():
            measured[name]["heldout_gain"] = gain
        clock.lap("held-out losses")
    shapes = layer_shapes(layers)
    rows = [layer_row(observed[name], shapes[name], ranks[name], flags[name], measured[name]) for name in layers]
    save_table(rows, output / "layers.csv")

    if "profile" in studies:
        report["profile"] = profile_study(rows, observed, output)
    if "sizes" in studies:
        report["sizes"] = sizes_study(statistics.observed, output)
    if "gains" in studies:
        report["gains"] = gains_study(rows, options.rho_threshold, output)
    if "angles" in studies:
        report["angles"] = angles_study(rows, compared, options.rho_threshold, output)
    clock.lap("tables")
    compared.clear()
    if "gate" in studies:
        scores = {row["layer"]: row[options.gate_by] for row in rows}
        report["gate"] = gate_study(model, layers, statistics.moments, scores, texts, options)
        clock.lap("gate")

    report |= {"layers": rows, "seconds": clock.seconds, "peak_memory_bytes": peak_memory_bytes(device)}
    write_json(report, options.report or output / "report.json")
    print("\nseconds: " + ", ".join(f"{phase} {value:.0f}" for phase, value in clock.seconds.items()))
    print(f"peak memory {report['peak_memory_bytes'] / 1e9:.2f} GB; tables and figures are in {output}")
    return report


def check(options: Namespace) -> Namespace:
    """Refuse invalid options before anything is loaded.

    Raises:
        ValueError: If an option is out of range.
        FileNotFoundError: If a file is missing.
        ModuleNotFoundError: If matplotlib or scipy is not installed.
    """
    require("The figures and correlations need", "plot", "matplotlib", "scipy")
    check_sources(options.calibration, "calibration")
    FascCallback(rank=options.rank)  # refuses wrong values
    for threshold in options.thresholds:
        Gate(threshold, options.gate_by, options.gate_exclude)
    check_emergence_options(options.rho_threshold, observations=1)
    if unknown := [study for study in options.studies if study not in STUDIES]:
        raise ValueError(f"Expected --studies to be of {', '.join(STUDIES)} but got {', '.join(unknown)}.")
    for name in ("windows", "heldout_windows", "window", "eval_windows"):
        if options[name] < 1:
            raise ValueError(f"Expected --{name.replace('_', '-')} to be at least 1 but got {options[name]}.")
    options.eval_text = named_files(options.eval_text)
    return options


def uniform_ranks(layers: dict[str, nn.Module], rank: float) -> dict[str, int]:
    """Return the rank of every layer.

    Raises:
        ValueError: If a layer cannot have this rank.
    """
    shapes = layer_shapes(layers)
    ranks = {name: resolve_rank(m, n, rank) for name, (m, n) in shapes.items()}
    if small := [name for name, k in ranks.items() if k > min(shapes[name])]:
        raise ValueError(f"Expected --rank of at most min(m, n) but {small[0]} is {shapes[small[0]]}; got {rank}.")
    return ranks


def evaluation_texts(options: Namespace, tokenizer: Any) -> dict[str, Tensor]:
    """Return texts as windows: the user's, or the built-in one if none is given."""
    sizes = options.eval_windows, options.window
    texts = {name: file_windows(path, tokenizer, *sizes) for name, path in options.eval_text.items()}
    return texts or {"python-reference": text_windows(builtin_text(), tokenizer, *sizes)}


def compare_layers(
    layers: Mapping[str, nn.Module], moments: CalibrationMoments, ranks: Mapping[str, int], keep_weights: bool
) -> dict[str, LayerComparison]:
    """Factorise each layer that a gradient reached with both solvers.

    Args:
        layers: The layers.
        moments: Their moments.
        ranks: Their ranks.
        keep_weights: Whether to keep the approximations, which together take twice the size of the layers.
    """
    compared = {}
    for name, layer in layers.items():
        if moments.tokens(name) == 0:
            continue
        W = linear_weight(layer).detach()
        compared[name] = compare_layer(W, moments.layer(name), ranks[name], METHOD, CHEAP_METHOD)
        if not keep_weights:
            compared[name].approximations.clear()
    return compared


def heldout_gains(
    model: Any, layers: dict[str, nn.Module], compared: Mapping[str, LayerComparison], windows: Tensor
) -> dict[str, float]:
    """Return log10 of svd's loss over fasc's loss, on windows that neither was fitted to."""
    weights = {name: linear_weight(layer) for name, layer in layers.items()}
    losses = HeldoutLosses(weights, {name: comparison.approximations for name, comparison in compared.items()})
    for _ in backward_windows(model, Taps(layers, pairs=losses), windows, progress=sys.stderr.isatty()):
        pass
    found = {name: losses.losses(name) for name in compared}
    return {name: log_ratio(J[CHEAP_METHOD], J[METHOD]) for name, J in found.items()}


# The studies.


def profile_study(rows: Sequence[Row], observed: Mapping[str, Observation], output: Path) -> list[Row]:
    """Show rho by kind of layer and depth."""
    history = RhoHistory(observation.row for observation in observed.values())
    history.to_csv(output / "history.csv")
    save_figure(rho_profile(history.at()), output / "profile.png")
    return publish("profile: rho by kind of layer", profile_table(rows), output / "profile.csv")


def sizes_study(observed: Mapping[int, Mapping[str, Observation]], output: Path) -> dict[str, list[Row]]:
    """Show rho on nested prefixes of the tokens."""
    tidy = [{"size": size, **o.row, "pooled": o.pooled} for size, layers in observed.items() for o in layers.values()]
    save_table(tidy, output / "sizes_layers.csv")
    medians = publish("sizes: rho on so many tokens", sizes_table(observed), output / "sizes.csv")
    title = "sizes: do layers keep their order? Pearson's r across layers"
    correlations = publish(title, size_correlations(observed), output / "sizes_correlations.csv")
    return {"medians": medians, "correlations": correlations}


def gains_study(rows: Sequence[Row], threshold: float, output: Path) -> dict[str, list[Row]]:
    """Show the gain of fasc over svd, and whether rho predicts it."""
    for score, label in SCORES.items():
        figure = rho_gain_scatter(
            {row["layer"]: row[score] for row in rows},
            {row["layer"]: row["heldout_gain"] for row in rows},
            threshold=threshold,
            rho_label=label,
            gain_label="gain of fasc over svd on held-out windows,\nlog10 of the ratio of losses",
        )
        save_figure(figure, output / f"gains_{score}.png")
    return {
        "kinds": publish("gains: log10(loss of svd / loss of fasc)", gains_table(rows), output / "gains.csv"),
        "correlations": publish(
            "gains: does rho tell?", correlations_table(rows), output / "gains_correlations.csv"
        ),
    }  # fmt: skip


def angles_study(
    rows: Sequence[Row], compared: Mapping[str, LayerComparison], threshold: float, output: Path
) -> list[Row]:
    """Show the angles between the inputs that fasc and svd keep, for layers of high and low debiased rho."""
    angles = {name: comparison.angles for name, comparison in compared.items()}
    spaces = {row["layer"]: (row["n"], row["rank"]) for row in rows}
    divided = divisions({row["layer"]: row["debiased"] for row in rows if row["layer"] in angles}, threshold)
    labels = {"fifths": "the middle fifths of debiased rho", "threshold": f"debiased rho = {threshold:g}"}
    for division, (high, low) in divided.items():
        sides = [{name: angles[name] for name in side} for side in (high, low)]
        save_figure(angles_figure(sides[0], sides[1], labels[division]), output / f"angles_{division}.png")
    if "threshold" not in divided:
        print(f"\nAll layers are on one side of {labels['threshold']}.")
    title = "angles: between the inputs that fasc and svd keep, in degrees"
    return publish(title, angles_table(divided, angles, spaces), output / "angles.csv")


def gate_study(
    model: Any,
    layers: dict[str, nn.Module],
    moments: CalibrationMoments,
    scores: Mapping[str, float],
    texts: Mapping[str, Tensor],
    options: Namespace,
) -> list[Row]:
    """Compress the same model behind each gate, measure it, and put the dense layers back.

    All rows spend one budget in one unit of loss, so only the choice of solvers differs. Gates that select the same
    layers are measured once. The seconds of a layer on svd include the conversion of its loss to that unit.
    """
    selections = {"no gate: all fasc": choose_methods(scores, None, METHOD)}
    for threshold in options.thresholds:
        methods = choose_methods(scores, threshold, METHOD, options.gate_exclude)
        selections[f"{options.gate_by} > {threshold:g}"] = methods
    selections["all svd"] = dict.fromkeys(scores, CHEAP_METHOD)
    table: list[Row] = []
    measured: dict[tuple[str, ...], Row] = {}
    for gate, methods in selections.items():
        key = tuple(methods.values())
        if key not in measured:
            measured[key] = measure_gate(model, layers, moments, methods, texts, options)
        table.append({"gate": gate, "layers on fasc": key.count(METHOD), **measured[key]})
    dense = {"gate": "dense model", "layers on fasc": 0, "kept": 1.0, "seconds": 0.0, **perplexities(model, texts)}
    title = f"gate: fasc above, svd below, rank {options.rank}, {options.allocation} allocation"
    return publish(title, [*table, dense], Path(options.output) / "gate.csv")


def measure_gate(
    model: Any,
    layers: dict[str, nn.Module],
    moments: CalibrationMoments,
    methods: Mapping[str, str],
    texts: Mapping[str, Tensor],
    options: Namespace,
) -> Row:
    """Return the share of parameters kept, seconds of factorising, and perplexities with each layer on its solver."""
    clock = Stopwatch()

    def timed(names: Sequence[str], phase: str) -> Iterator[str]:
        clock.lap("between")
        yield from names
        clock.lap(phase)

    result = compress_layers(
        layers,
        moments,
        rank=options.rank,
        method=METHOD,
        methods=methods,
        allocation=options.allocation,
        device=model.device,
        progress=timed,
        consume=False,
    )
    kept = layer_sizes({**layers, **result.replacements}).parameters / layer_sizes(layers).parameters
    dense = swap_modules(model, result.replacements)
    try:
        found = perplexities(model, texts)
    finally:
        swap_modules(model, dense)
    del result
    return_freed_memory()
    return {"kept": kept, "seconds": clock.seconds["Factorising"], **found}


def perplexities(model: Any, texts: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the perplexity of each text."""
    return {f"perplexity of {name}": perplexity(model, windows, batch_size=2) for name, windows in texts.items()}


def publish(title: str, rows: list[Row], path: Path) -> list[Row]:
    """Print a table, save it as CSV and return it."""
    print(f"\n{table_text(title, rows)}")
    save_table(rows, path)
    return rows


class Stopwatch:
    """Seconds by phase; each lap is the time since the previous one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End a phase under this name."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now


if __name__ == "__main__":
    run_program(main)
