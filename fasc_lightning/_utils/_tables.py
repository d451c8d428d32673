"""Tables of plain rows, as text, Markdown and CSV."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from fasc_lightning._utils._atomic_files import whole_file

#: One row of a table: values by column. All rows of a table have the same columns.
Row = dict[str, Any]


def table_text(title: str, rows: Sequence[Mapping[str, Any]], width: int = 140) -> str:
    """Return rows as a table: numbers on the right with three decimals, NaN as a dash.

    Args:
        title: Title above the table.
        rows: One or more rows; the first one gives the columns.
        width: Characters a line; long headings are wrapped.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left")
    for name, value in rows[0].items():
        table.add_column(escape(name), justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(escape(_shown(value)) for value in row.values()))
    console = Console(width=width, file=(text := StringIO()), force_terminal=False, force_jupyter=False)
    console.print(table)
    return text.getvalue().rstrip()


def _shown(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if math.isnan(value):
        return "-"
    return f"{value:,.3f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.2g}"


def markdown_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return one or more rows as a Markdown table, numbers with three decimals and NaN as a dash."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell_text(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell_text(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.3f}"
    return str(value).replace("|", "\\|")


def save_table(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write one or more rows as a CSV file, atomically."""
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
