"""The report of a comparison: tables as Markdown and CSV, figures, and one JSON file with all numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fasc_lightning._utils import Row, markdown_table, save_table, whole_file, write_json
from fasc_lightning.dependence import RhoRow, rho_gain_scatter, save_figure
from fasc_lightning.studies.comparison._bytes import bytes_numbers, bytes_table, comparison_table
from fasc_lightning.studies.comparison._bytes_figure import bytes_figure
from fasc_lightning.studies.comparison._cells import FOLDER, Budget, Cell, Outcome
from fasc_lightning.studies.comparison._figures import budget_figure, kinds_figure, sensitivity_figure
from fasc_lightning.studies.comparison._layers import correlation_rows, fifths_rows, labelled_rows, layer_rows
from fasc_lightning.studies.comparison._peer import read_peer
from fasc_lightning.studies.comparison._questions import Evaluation
from fasc_lightning.studies.comparison._tables import (
    UNRANKED,
    budget_rows,
    failure_lines,
    kinds_rows,
    metrics_of,
    results_rows,
    winners_rows,
)

MARKS = (
    "In the tables, **bold** is the best of a column. ≈ ties with it: over the same windows, facts or sentence pairs, "
    "the 95 % bootstrap interval of the difference holds 0. Beside perplexities stands how many times that of the "
    "dense model they are, beside percentages the share of the dense model's."
)
BYTES_NOTE = (
    "*bytes* is the share of the targeted layers' bytes in 16 bits, with codes packed without gaps. *one budget* chose "
    "bits, residuals and ranks layer by layer under one size. *same bits* gave all layers the same bits. *to the "
    "nearest* is the same without a calibration. KL is the divergence of the dense model's predictions from this "
    "model's, in nats a token. Seconds are those of all steps from the dense model to the compressed one. Other "
    "programs stated their own, with their own number of threads."
)
EQUAL_NOTE = (
    "Each row sets a model of one budget beside another model with as many bytes or up to a quarter more. It gives the "
    "ratio of perplexities, the ratio of divergences and the difference of facts in points, over the same windows or "
    "facts, with 95 % bootstrap intervals. **Bold** is better than the other, ≈ ties with it."
)
UNRANKED_NOTE = "_Italics_: methods that only write zeros, which stay in memory; they take no part in the ranking."


@dataclass
class Report:
    """Sections of Markdown and their numbers, written while the comparison runs.

    Attributes:
        folder: Folder of the files.
        title: Title of the page.
        head: Facts about the run, for JSON and the page.
        seed: Seed of the bootstrap.
    """

    folder: Path
    title: str
    head: dict[str, Any]
    seed: int
    sections: list[str] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def grid(self, dense: Outcome, outcomes: Mapping[Cell, Outcome], evaluation: Evaluation) -> None:
        """Add the grid: a table per budget, the best methods, and figures against the parameters kept."""
        assert dense.measured is not None
        metrics = metrics_of(dense.measured)
        budgets = budgets_of(outcomes)
        rows = results_rows(dense, outcomes, evaluation.kinds)
        save_table(rows, self.folder / "results.csv")
        winners = winners_rows(outcomes, budgets, metrics, self.seed)
        self.numbers |= {"cells": rows, "best": winners, "chance of facts": evaluation.chance}
        unranked = any(cell.method in UNRANKED for cell in outcomes)
        self._add("Who is best", winners, MARKS, UNRANKED_NOTE if unranked else "")
        for budget in budgets:
            own = {cell: outcome for cell, outcome in outcomes.items() if cell.budget == budget}
            notes = [f"Failed: {line}" for line in failure_lines(own)]
            self._add(str(budget), budget_rows(dense, own, metrics, self.seed), *notes)
        texts = [metric for metric in metrics if metric.scale == "perplexity"]
        others = [metric for metric in metrics if metric.percent]
        for name, chosen in (("perplexity", texts), ("recall", others)):
            if chosen:
                chance = {"facts %": evaluation.chance, "syntax %": 50.0}
                self._figure(f"budgets_{name}", budget_figure(dense, outcomes, chosen, chance))

    def by_bytes(
        self,
        dense: Outcome,
        outcomes: Mapping[Cell, Outcome],
        evaluation: Evaluation,
        rest: int,
        calibration: float,
        speeds: Mapping[Cell, Mapping[str, float]] | None = None,
    ) -> None:
        """Add models by their bytes: the table, comparisons at equal bytes, other programs' settings and the figure.

        Args:
            dense: Outcome of the dense model.
            outcomes: Outcomes of the other cells.
            evaluation: The questions.
            rest: Bytes of the model outside of the targeted layers.
            calibration: Seconds of the pass over the calibration data.
            speeds: Tokens per second, of the cells in which they were measured.
        """
        assert dense.measured is not None
        metrics = metrics_of(dense.measured)
        numbers = bytes_numbers(dense, outcomes, rest, calibration, speeds or {})
        save_table(numbers, self.folder / "results.csv")
        self.numbers |= {"models": numbers, "chance of facts": evaluation.chance}
        self._add("Models by their bytes", bytes_table(numbers, metrics), BYTES_NOTE)
        self._failures(outcomes)
        if any(outcome.measured is not None for outcome in outcomes.values()):
            self._figure("bytes", bytes_figure(dense, outcomes, evaluation.chance))
        if compared := comparison_table(dense, outcomes, self.seed):
            self.numbers["at equal bytes"] = compared
            self._add("At equal bytes", compared, EQUAL_NOTE)
        if peers := {Path(c.label).name: read_peer(c.label) for c in outcomes if c.method == FOLDER}:
            self.numbers["other programs"] = {name: vars(peer) for name, peer in peers.items()}
            rows: list[Row] = [
                {
                    "model": name,
                    "program": f"{peer.name} {peer.version}",
                    "bits": f"{peer.bits:g}",
                    "group": peer.group if peer.group and peer.group > 0 else "a row",
                    "seconds": f"{peer.seconds:.0f}",
                    "threads": peer.threads,
                }
                for name, peer in peers.items()
            ]
            self._add("Other programs", rows, "Their settings stand in results.json.")

    def kinds(self, dense: Outcome, outcomes: Mapping[Cell, Outcome], evaluation: Evaluation) -> None:
        """Add recall by kind of relation (Table 6)."""
        if MARKS not in "".join(self.sections):
            self.sections.append(MARKS)
        if not evaluation.facts:
            self.sections.append("## Facts by kind\n\nNo facts were asked for.")
            return
        for budget in budgets_of(outcomes):
            own = {cell: outcome for cell, outcome in outcomes.items() if cell.budget == budget}
            rows = kinds_rows(dense, own, evaluation.kinds, self.seed)
            self._add(f"Facts by kind, {budget}, % recalled", rows)
        self._figure("kinds", kinds_figure(dense, outcomes, budgets_of(outcomes), evaluation.kinds))

    def sensitivity(
        self, dense: Outcome, outcomes: Mapping[Cell, Outcome], rank: float, scores: Mapping[str, RhoRow] | None
    ) -> None:
        """Add the changes from compressing each layer alone (Fig. 2), beside rho if there are scores."""
        known = None if scores is None else {name: dict(row) for name, row in scores.items()}
        rows = layer_rows(dense, outcomes, known)  # type: ignore[arg-type]
        save_table(rows, self.folder / "layers.csv")
        self.numbers["layers"] = rows
        methods = list(dict.fromkeys(cell.method for cell in outcomes))
        by_layer = {row["layer"]: row for row in rows}
        layers = list(dict.fromkeys(cell.label for cell in outcomes))  # in the model's order, unlike the rows
        alone = f"each layer alone at rank {rank:g}"
        changes = {"loss": "change of the mean token loss (nats)", "facts": "change of recall (percentage points)"}
        self.sections.append(f"## One layer at a time\n\nEvery number, layer by layer: layers.csv; {alone}.")
        for name, label in changes.items():
            found = {
                method: {layer: by_layer[layer][f"{name} change, {method}"] for layer in layers} for method in methods
            }
            if any(value == value for changed in found.values() for value in changed.values()):
                self._figure(f"sensitivity_{name}", sensitivity_figure(found, label, f"{label}, {alone}"))
        self._failures(outcomes)
        if scores is None:
            return
        self._add("Critical and safe layers, one at a time", fifths_rows(rows), file="critical.csv")
        self._add("Does rho tell what a layer alone costs?", correlation_rows(rows), file="correlations.csv")
        rho = {row["layer"]: row["debiased"] for row in rows}
        for method in methods:
            change = {row["layer"]: row[f"loss change, {method}"] for row in rows}
            if any(rho[name] == rho[name] and change[name] == change[name] for name in rho):
                label = f"{changes['loss']},\n{method}, {alone}"
                figure = rho_gain_scatter(rho, change, rho_label="debiased rho", gain_label=label)
                self._figure(f"rho_sensitivity_{method}", figure)

    def labelled(self, title: str, dense: Outcome, outcomes: Mapping[Cell, Outcome], file: str, note: str) -> None:
        """Add the labelled cells of a study (Tables 7 and 8)."""
        self._add(title, labelled_rows(dense, outcomes), note, file=file)
        self._failures(outcomes)

    def write(self) -> dict[str, Any]:
        """Write results.md and results.json, and return the content of results.json."""
        facts = "\n".join(f"* {name}: {_plain(value)}" for name, value in self.head.items())
        page = "\n\n".join([f"# {self.title}", facts, *self.sections]) + "\n"
        with whole_file(self.folder / "results.md") as temporary:
            temporary.write_text(page, encoding="utf-8")
        content = {**self.head, **self.numbers}
        write_json(content, self.folder / "results.json")
        return content

    def _add(self, title: str, rows: Sequence[Row], *notes: str, file: str | None = None) -> None:
        text = [f"## {title}", markdown_table(rows), *notes]
        self.sections.append("\n\n".join(part for part in text if part))
        if file is not None:
            save_table(rows, self.folder / file)
            self.numbers[Path(file).stem] = list(rows)

    def _failures(self, outcomes: Mapping[Cell, Outcome]) -> None:
        if lines := failure_lines(outcomes):
            self.sections.append("\n\n".join(f"Failed: {line}" for line in lines))

    def _figure(self, name: str, figure: Any) -> None:
        save_figure(figure, self.folder / f"{name}.png")
        self.sections.append(f"![{name.replace('_', ' ')}]({name}.png)")


def budgets_of(outcomes: Mapping[Cell, Outcome]) -> list[Budget]:
    """Return the budgets of cells, in order."""
    return list(dict.fromkeys(cell.budget for cell in outcomes if cell.budget is not None))


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, float):
        return f"{value:.1f}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
