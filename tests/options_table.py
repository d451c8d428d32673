"""The table of docs/options.md, made from the options' declarations; `python tests/options_table.py` writes it."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path

from fasc_lightning.options import CompressionOptions
from fasc_lightning.options._compression import FLAT, GROUPS
from fasc_lightning.options._described import descriptions

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
#: What stands around the table.
BEGIN, END = "<!-- options: made by tests/options_table.py -->\n", "<!-- /options -->\n"


def options_table() -> str:
    """Return the table in markdown: an option a row, those of a group after the row of the group."""
    flat = {(part.group, part.option): name for name, part in FLAT.items() if name != "gate_threshold"}
    rows = ["| option | default | what it does |", "|---|---|---|"]
    for field in fields(CompressionOptions):
        name, group = field.name, GROUPS.get(field.name)
        described = descriptions(CompressionOptions)[name]
        rows.append(f"| `{name}` | {'' if group else code(field.default)} | {escaped(described)} |")
        for part in fields(group) if group else ():
            other = flat.get((name, part.name))
            names = f"`{name}.{part.name}`" + (f", `{other}`" if other else "")
            assert part.default is not MISSING
            rows.append(f"| {names} | {code(part.default)} | {escaped(descriptions(group)[part.name])} |")
    return "\n".join(rows) + "\n"


def code(value: object) -> str:
    return f"`{value!r}`".replace("'", '"')


def escaped(text: str) -> str:
    """Return text for a cell: no cell ends, no emphasis."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("_", "\\_")


def with_table(page: str) -> str:
    """Return the page with the table as it should be."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + options_table() + END + after


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
