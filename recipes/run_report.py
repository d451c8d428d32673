"""Results of runs that track rho: tables, figures, the report, and its numbers in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jsonargparse import Namespace
from numpy.typing import NDArray

from fasc_lightning import RhoHistory, emergence
from fasc_lightning.cli import Row, library_versions, save_table
from fasc_lightning.dependence import Metrics, rho_heatmap, rho_profile, save_figure, training_figure
from fasc_lightning.evaluation import FactsResult

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KNOWN = 80.0  # percent recalled; above it the report calls the facts known


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        model: The model with its last weights.
        tokenizer: Its tokenizer.
        history: The observations of rho.
        rows: Step, loss and recall in percent, at all steps of ``history`` and the last; NaN for missing values.
        recall: The last measurement of recall; None without facts.
        seconds: Seconds by phase.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    history: RhoHistory
    rows: list[Row]
    recall: FactsResult | None
    seconds: dict[str, float]

    @property
    def metrics(self) -> Metrics:
        """Curves of loss and recall; the loss has none at step 0."""
        steps = [row["step"] for row in self.rows]
        curves: dict[str, tuple[Any, Any]] = {"loss": (steps[1:], [row["loss"] for row in self.rows[1:]])}
        if self.recall is not None:
            curves["recall"] = (steps, [row["recall"] for row in self.rows])
            curves["recall by chance"] = (steps, [self.recall.chance] * len(steps))
        return curves


def write_outputs(runs: Mapping[str, Run], threshold: float, output: Path) -> None:
    """Write tables, figures and the main run's model.

    Args:
        runs: The runs by name, the main one first.
        threshold: Threshold of rho for the marks of emergence.
        output: The folder.
    """
    for name, run in runs.items():
        prefix = "control_" if name == "control" else ""
        run.history.to_csv(output / f"{prefix}history.csv")
        save_table(run.rows, output / f"{prefix}training.csv")
        save_figure(rho_heatmap(run.history, threshold=threshold), output / f"{prefix}heatmap.png")
        save_figure(rho_profile(run.history.at()), output / f"{prefix}profile.png")
    curves = {name: (run.history, run.metrics) for name, run in runs.items()}
    save_figure(training_figure(curves), output / "training.png")
    main_run = next(iter(runs.values()))
    main_run.model.save_pretrained(output / "model")
    main_run.tokenizer.save_pretrained(output / "model")


def full_report(options: Namespace, runs: Mapping[str, Run], seconds: float) -> dict[str, Any]:
    """Return the report: options, versions, results and comparisons of runs, and a summary in words."""
    model = next(iter(runs.values())).model
    content: dict[str, Any] = {
        "model": options.model or "small decoder",
        "parameters": sum(p.numel() for p in model.parameters()),
        "options": options.as_dict(),
        "seed": options.seed,
        "versions": library_versions(),
        "runs": {name: run_report(run, options.rho_threshold) for name, run in runs.items()},
        "comparison": compare_runs(runs["facts"], runs["control"]) if "control" in runs else None,
    }
    content["reading"] = reading(content, options)
    content["seconds"] = {**{name: sum(run.seconds.values()) for name, run in runs.items()}, "all": seconds}
    return content


def run_report(run: Run, threshold: float) -> dict[str, Any]:
    """Return the results of one run."""
    rows, history, recall = run.rows, run.history, run.recall
    last = history.at().values()
    rho, null, debiased = (defined(row[name] for row in last) for name in ("rho", "null", "debiased"))
    steps, recalled = recall_at_observations(run)
    means = over_layers(history, "debiased")
    known = [row["step"] for row in rows if row["recall"] >= KNOWN]
    return {
        "loss": rows[-1]["loss"],
        "first_loss": rows[1]["loss"],
        "recall": recall and recall.percent,
        "chance": recall and recall.chance,
        "recall_by_kind": recall and recall.to_dict()["by_kind"],
        "known_at_step": known[0] if known else None,
        "rho": {
            "step": history.steps[-1],
            "layers": len(history.layers),
            "undefined": len(history.layers) - len(rho),
            "mean": mean(rho),
            "median": median(rho),
            "null_mean": mean(null),
            "debiased_mean": mean(debiased),
            "debiased_median": median(debiased),
            "above_null": mean(defined(row["rho"] - row["null"] for row in last) > 0),
            "above_threshold": mean(rho > threshold),
            "debiased_above_threshold": mean(debiased > threshold),
        },
        "debiased_mean_at": dict(zip(map(str, steps), means.tolist(), strict=True)),
        "emergence": emergence(history, threshold),
        "correlation_of_recall_and_rho": correlation(recalled, means),
        "correlation_of_their_changes": correlation(np.diff(recalled), np.diff(means)),
        "seconds": run.seconds,
    }


def compare_runs(facts: Run, control: Run) -> dict[str, Any]:
    """Return the difference of the runs' mean debiased rho, and the correlations that the control shows too.

    Any two series with a trend correlate. So recall in the run on facts is also correlated with rho of the control,
    which memorises nothing, and with the difference of the two.
    """
    mine, other = over_layers(facts.history, "debiased"), over_layers(control.history, "debiased")
    _, recalled = recall_at_observations(facts)
    difference = mine - other
    late = difference[len(difference) // 2 :]
    by_layer = facts.history.matrix("debiased") - control.history.matrix("debiased")
    by_layer = by_layer[:, by_layer.shape[1] // 2 :]
    return {
        "debiased_difference_last": float(difference[-1]),
        "debiased_difference_second_half": mean(late),
        "debiased_difference_second_half_deviation": float(np.std(known))
        if (known := late[np.isfinite(late)]).size
        else math.nan,
        "debiased_difference_by_layer": {
            layer: mean(defined(row)) for layer, row in zip(facts.history.layers, by_layer, strict=True)
        },
        "correlation_of_recall_and_rho_of_control": correlation(recalled, other),
        "correlation_of_recall_and_difference": correlation(recalled, difference),
    }


def reading(content: Mapping[str, Any], options: Namespace) -> list[str]:
    """Return in words the numbers and the limits of their meaning."""
    lines = []
    for name, run in content["runs"].items():
        rho, first = run["rho"], next(iter(run["debiased_mean_at"].values()))
        lines.append(f"{name}: loss {run['first_loss']:.2f} at first, {run['loss']:.2f} at the end")
        if run["recall"] is not None:
            known = run["known_at_step"]
            when = f"{KNOWN:.0f} % from step {known:.0f}" if known is not None else f"never {KNOWN:.0f} %"
            lines.append(f"  recall {run['recall']:.1f} % (chance {run['chance']:.1f} %), {when}")
        emerged = [step for step in run["emergence"].values() if step is not None]
        lines += [
            f"  mean debiased rho {first:.3f} at step 0, {rho['debiased_mean']:.3f} at step {rho['step']}",
            f"  plain rho there: mean {rho['mean']:.3f}, of its null {rho['null_mean']:.3f}; of {rho['layers']} layers "
            f"{rho['above_null']:.0%} above their null, {rho['above_threshold']:.0%} above {options.rho_threshold:g}; "
            f"{len(emerged)} layers emerged at some step, {emerged.count(0)} of them at step 0",
        ]
        if run["recall"] is not None:
            lines.append(
                f"  over the observations, recall and mean debiased rho correlate with r = "
                f"{run['correlation_of_recall_and_rho']:.2f}, their changes with "
                f"r = {run['correlation_of_their_changes']:.2f}"
            )
    if comparison := content["comparison"]:
        lines += [
            "facts minus control: mean debiased rho differs by "
            f"{comparison['debiased_difference_last']:+.3f} at the end, "
            f"{comparison['debiased_difference_second_half']:+.3f} over the second half (standard deviation over its "
            f"observations {comparison['debiased_difference_second_half_deviation']:.3f})",
            "  recall of the facts correlates with r = "
            f"{comparison['correlation_of_recall_and_rho_of_control']:.2f} with rho of the control, which knows none, "
            f"and with r = {comparison['correlation_of_recall_and_difference']:.2f} with the difference",
        ]
    lines += [
        f"One seed, {min(options.monitor_tokens, options.batch_size * options.window)} tokens an observation. "
        "Observations of one run depend on each other: no correlation over them is a test.",
    ]
    return lines


def over_layers(history: RhoHistory, column: str) -> NDArray[np.float64]:
    """Return the mean over layers at each observed step; NaN if no layer is defined."""
    return np.array([mean(defined(values)) for values in history.matrix(column).T])


def recall_at_observations(run: Run) -> tuple[list[int], NDArray[np.float64]]:
    """Return the steps at which rho was observed, and the recall at these steps in percent."""
    recall = {row["step"]: row["recall"] for row in run.rows}
    return run.history.steps, np.array([recall[step] for step in run.history.steps])


def correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return Pearson's r over points with both values; NaN for fewer than three points or if one does not vary."""
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def defined(values: Any) -> NDArray[np.float64]:
    """Return the values that are not NaN."""
    array = np.array(list(values), dtype=np.float64)
    return array[~np.isnan(array)]


def mean(values: NDArray[Any]) -> float:
    """Return the mean; NaN without values."""
    return float(np.mean(values)) if len(values) else math.nan


def median(values: NDArray[np.float64]) -> float:
    """Return the median; NaN without values."""
    return float(np.median(values)) if len(values) else math.nan
