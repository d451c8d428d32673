"""Measured results in a model card: the hub's model index, and a table of all states of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fasc_lightning._utils import Row, markdown_table

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

#: The parts of a report that are results.
RESULTS = ("perplexity", "held_out", "divergence", "facts", "minimal_pairs")

#: States of a compressed model, the latest first. The other one is the dense model's.
STATES = ("recovered", "compressed")


def measured(report: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the results of a report that are there; those in ``evaluation`` replace the report's."""
    found = {**{name: report.get(name) for name in RESULTS}, **(evaluation or {})}
    return {name: value for name, value in found.items() if value}


def eval_results(results: Mapping[str, Any], task: str) -> list[EvalResult]:
    """Return the compressed model's figures in the form of the hub's model index.

    A text or a set of questions is a data set by the name that the report gives it. Figures that are missing or not
    finite are left out.

    Args:
        results: :func:`measured` results.
        task: The hub's name of the model's task.
    """
    from huggingface_hub import EvalResult

    def result(
        dataset: str, metric: str, name: str, values: Mapping[str, Any], kind: str | None = None, **about: Any
    ) -> Iterator[EvalResult]:
        value = next((values[state] for state in STATES if values.get(state) is not None), None)
        if value is not None and math.isfinite(value):
            yield EvalResult(
                task_type=task,
                dataset_type=dataset,
                dataset_name=dataset if kind is None else f"{dataset}: {kind}",
                dataset_config=kind,
                metric_type=metric,
                metric_name=name,
                metric_value=float(value),
                **about,
            )

    found: list[EvalResult] = []
    for text, values in _perplexities(results).items():
        found += result(text, "perplexity", "perplexity", values)
    for text, values in results.get("divergence", {}).items():
        found += result(text, "kl_divergence", "KL(dense || compressed), nats a token", values)
    for asked, title in (("facts", "facts recalled, %"), ("minimal_pairs", "minimal pairs, %")):
        answers = results.get(asked, {})
        chance = {"metric_args": {"chance": answers["chance"]}} if "chance" in answers else {}
        for kind, values in {None: answers, **answers.get("by_kind", {})}.items():
            count = {"dataset_args": {"count": values["count"]}} if "count" in values else {}
            found += result(asked, "accuracy", title, values, kind, **count, **(chance if kind is None else {}))
    return found


def costs(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield the section on the measured results, if there are some."""
    rows: list[Row] = [
        {"": f"perplexity of {name}", **{state: f"{value:.2f}" for state, value in values.items()}}
        for name, values in _perplexities(results).items()
    ]
    rows += [
        {"": f"KL on {name}, nats a token", **{state: f"{value:.4f}" for state, value in values.items()}}
        for name, values in results.get("divergence", {}).items()
    ]
    for asked, title, kinds in (("facts", "facts recalled", "facts"), ("minimal_pairs", "minimal pairs", "pairs")):
        if answers := results.get(asked):
            states = [
                name
                for name, value in answers.items()
                if isinstance(value, int | float) and name not in ("chance", "count")
            ]
            chance = f", chance {answers['chance']:.1f} %" if "chance" in answers else ""
            rows.append({"": f"{title}{chance}", **{state: f"{answers[state]:.1f} %" for state in states}})
            rows += [
                {"": f"{kinds}: {kind}", **{state: f"{value[state]:.1f} %" for state in states}}
                for kind, value in answers.get("by_kind", {}).items()
            ]
    if rows:
        columns = {name: "" for row in rows for name in row}
        yield "## What it costs\n\n" + markdown_table([{**columns, **row} for row in rows])


def _perplexities(results: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the perplexities of texts by state, and of the held-out data if there are some."""
    held_out = results.get("held_out")
    return {**results.get("perplexity", {}), **({"held-out data": held_out} if held_out else {})}
