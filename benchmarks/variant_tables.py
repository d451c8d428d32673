"""Tables of `fasc_variants.py`: each variant's changes against references, with intervals and a verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fasc_lightning.cli import Row, markdown_table
from fasc_lightning.evaluation import PairedInterval, paired_interval
from fasc_lightning.studies.comparison import shown_perplexity

#: The references of changes; the first one is always measured.
REFERENCES = ("plain", "fasc")


def verdict(intervals: Sequence[PairedInterval]) -> str:
    """Return "hurts" if a perplexity is higher beyond its interval, "helps" if all are lower, else "tie"."""
    if any(interval.low > 1 for interval in intervals):
        return "hurts"
    return "helps" if all(interval.high < 1 for interval in intervals) else "tie"


def result_rows(cells: Sequence[Mapping[str, Any]], seed: int = 0) -> list[Row]:
    """Return one row per cell: perplexities, changes against each reference with intervals, and verdicts."""
    by_name = {(cell["variant"], cell["keep"]): cell for cell in cells}
    references = [name for name in REFERENCES if any(name == variant for variant, _ in by_name)]
    rows = []
    for cell in cells:
        row: Row = {"variant": cell["variant"], "keep": cell["keep"], "kept": cell["kept"]}
        row |= {f"{text} perplexity": value for text, value in cell["perplexity"].items()}
        for name in references:
            reference = by_name[name, cell["keep"]]
            changes = {
                text: paired_interval(reference["losses"][text], values, seed, scale="perplexity")
                for text, values in cell["losses"].items()
            }
            for text, change in changes.items():
                row[f"{text} against {name}"] = change.estimate
                row[f"{text} against {name} low"], row[f"{text} against {name} high"] = change.low, change.high
            row[f"verdict against {name}"] = verdict(list(changes.values())) if cell is not reference else "reference"
        row |= {f"{phase} seconds": value for phase, value in cell["seconds"].items()}
        rows.append(row)
    return rows


def markdown(rows: Sequence[Row], dense: Mapping[str, Any]) -> str:
    """Return a table of changes against each reference."""
    texts = list(dense["perplexity"])
    shown = ", ".join(f"{text} {shown_perplexity(value)}" for text, value in dense["perplexity"].items())
    parts = [f"Perplexity of the dense model: {shown}."]
    for name in (name for name in REFERENCES if f"verdict against {name}" in rows[0]):
        table = []
        for row in rows:
            line = {"variant": row["variant"], "keep": str(row["keep"])}
            line |= {text: shown_perplexity(row[f"{text} perplexity"]) for text in texts}
            for text in texts:
                column = f"{text} against {name}"
                line[column] = _change(*(row[f"{column}{end}"] for end in ("", " low", " high")))
            table.append({**line, "verdict": row[f"verdict against {name}"]})
        parts.append(f"Change against {name}, with its 95 % interval:\n\n{markdown_table(table)}")
    return "\n\n".join(parts)


def _change(estimate: float, low: float, high: float) -> str:
    return f"{100 * (estimate - 1):+.1f} % [{100 * (low - 1):+.1f}, {100 * (high - 1):+.1f}]"
