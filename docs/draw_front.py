"""The front page's pictures: badges from pyproject.toml, and quality against bytes from the table of docs/bytes.md.

python docs/draw_front.py
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"

#: The text whose perplexity is drawn: another domain than the calibration's.
TEXT = "perplexity of c4"

#: Names of other programs' models, as a reader knows them.
PROGRAMS = {
    "gptqmodel": "GPTQModel",
    "hqq": "HQQ",
    "llmcompressor": "llm-compressor",
    "bitsandbytes": "bitsandbytes",
    "torchao-asym": "torchao",
    "quanto-hqq": "optimum-quanto",
}

#: Width of a character of a badge in pixels, and of the space at both ends of a text.
CHARACTER, SPACE = 6.6, 12


class Row(NamedTuple):
    """One model: its name and kind, the share of the bytes, and perplexity relative to the dense model."""

    model: str
    kind: str
    bytes: float
    times: float


def rows(page: str) -> list[Row]:
    """Return the rows of the first table with all models, without the dense one."""
    lines = iter(page[page.index("### Models by their bytes") :].splitlines())
    header = next(cells(line) for line in lines if line.startswith("| model"))
    next(lines)
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        row = dict(zip(header, cells(line), strict=True))
        if row["model"] != "dense":
            times = float(row[TEXT].split("(")[1].rstrip("x)"))
            found.append(Row(row["model"], row["kind"], float(row["bytes"].rstrip(" %")), times))
    return found


def best(models: list[Row]) -> list[Row]:
    """Return the best model of each share of the bytes, ascending: a size below 25 % is refitted by default."""
    least = {share: min(row.times for row in models if row.bytes == share) for share in {row.bytes for row in models}}
    return sorted((row for row in models if row.times == least[row.bytes]), key=lambda row: row.bytes)


def cells(line: str) -> list[str]:
    """Return the cells of a row of a table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def draw(models: list[Row]) -> Figure:
    """Draw perplexity against bytes: this package's models as lines, other programs as single points."""
    figure = Figure(figsize=(8.6, 4.3), layout="constrained")
    axes = figure.subplots()
    ours = {
        "one budget": ("one size for all layers", "#0072b2", "o-"),
        "same bits": ("the same bits in all layers", "#56b4e9", "s:"),
        "low rank in int8": ("low rank in int8", "#d55e00", "D"),
        "low rank": ("low rank", "#d55e00", "o"),
    }
    for kind, (label, colour, style) in ours.items():
        line = best([row for row in models if row.kind == kind])
        filled = colour if style != "s:" else "white"
        axes.plot(
            [row.bytes for row in line],
            [row.times for row in line],
            style,
            color=colour,
            mfc=filled,
            label=label,
            zorder=3,
        )
        for row in line:
            below = kind == "one budget"
            place = (6 if row is line[-1] else -3, -9 if row is line[-1] else -12) if below else (5, 6)
            side = "right" if below and row is not line[-1] else "left"
            name = row.model.removeprefix("size ").partition(", refitted")[0]
            axes.annotate(
                name, (row.bytes, row.times), place, textcoords="offset points", ha=side, color=colour, fontsize=9
            )
    others = [row for row in models if row.kind == "another program"]
    for marker, (prefix, name) in zip("^v<>PX", PROGRAMS.items(), strict=True):
        points = [row for row in others if row.model.rpartition("-")[0] == prefix]
        bits = ", ".join(row.model.rpartition("-")[2] for row in points)
        axes.plot(
            [row.bytes for row in points],
            [row.times for row in points],
            marker,
            color="#666",
            label=f"{name}, {bits} bits",
        )
    axes.axhline(1, color="black", linewidth=1)
    axes.annotate("dense", (98, 1), (0, 3), textcoords="offset points", ha="right")
    axes.set(xscale="log", yscale="log", xlim=(13, 100), ylim=(0.96, 3.3))
    axes.set(xlabel="bytes of the linear layers, % of 16 bits", ylabel="perplexity on C4, times dense")
    for axis, ticks in ((axes.xaxis, (15, 20, 30, 40, 60, 80, 100)), (axes.yaxis, (1, 1.1, 1.2, 1.5, 2, 3))):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:g}")
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", ncols=2, fontsize=9)
    return figure


def badges() -> dict[str, str]:
    """Return the badges by file name, from the project's own metadata."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    last = "Programming Language :: Python :: "
    versions = [name.removeprefix(last) for name in project["classifiers"] if name.startswith(f"{last}3.")]
    texts = {"python": ("python", ", ".join(versions)), "licence": ("licence", project["license"])}
    if "Typing :: Typed" in project["classifiers"]:
        texts["typed"] = ("types", "checked")
    return {f"badge-{name}.svg": badge(*text) for name, text in texts.items()}


def badge(name: str, value: str) -> str:
    """Return a picture of two texts side by side."""
    left, right = (round(CHARACTER * len(text)) + SPACE for text in (name, value))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right}" height="20" role="img" '
        f'aria-label="{name}: {value}">'
        f'<rect width="{left}" height="20" fill="#555"/><rect x="{left}" width="{right}" height="20" fill="#2a6db0"/>'
        '<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">'
        f'<text x="{left / 2:g}" y="14">{name}</text><text x="{left + right / 2:g}" y="14">{value}</text></g></svg>\n'
    )


if __name__ == "__main__":
    draw(rows((ROOT / "docs" / "bytes.md").read_text(encoding="utf-8"))).savefig(FIGURES / "front.png", dpi=150)
    for name, picture in badges().items():
        (FIGURES / name).write_text(picture, encoding="utf-8")
