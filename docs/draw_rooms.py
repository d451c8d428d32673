"""The picture of docs/architecture.md: the rooms by layer, from the contract that `make lint` checks.

python docs/draw_rooms.py
"""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

ROOT = Path(__file__).parents[1]

#: Where a token goes, in order.
JOURNEY = ["hooks", "statistics", "solvers", "compression", "layers", "refit", "models"]
UNCONSTRAINED = ["data", "evaluation"]


def layers() -> list[list[str]]:
    """Return the rooms and modules of each layer, highest first."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (c for c in contracts if c["type"] == "layers")
    return [[name.split(".")[-1] for name in layer.split(" | ")] for layer in contract["layers"]]


def title(name: str) -> str:
    """Return the first line of a room's or a module's docstring."""
    folder = ROOT / "fasc_lightning" / name
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0].rstrip(".").replace("`", "")


def draw() -> Figure:
    """Draw one row a layer; imports run down."""
    rows = [*layers(), UNCONSTRAINED]
    figure = Figure(figsize=(12, 0.62 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 12), ylim=(-0.75, len(rows) + 0.15))
    axes.axis("off")
    for index, names in enumerate(rows):
        y, width = len(rows) - 1 - index - (0.35 if names is UNCONSTRAINED else 0), 11.8 / len(names)
        for column, name in enumerate(names):
            x = 0.1 + column * width
            room = (ROOT / "fasc_lightning" / name).is_dir()
            face = "#e8eef7" if room else "#f7f1e3"
            box = FancyBboxPatch(
                (x, y), width - 0.12, 0.62, boxstyle="round,pad=0.02", facecolor=face, edgecolor="#567"
            )
            axes.add_patch(box)
            text = title(name)
            longest = int(15.2 * (width - 0.3)) - (4 if name in JOURNEY else 0) - len(name)
            text = text if len(text) <= longest else text[: longest - 1].rsplit(" ", 1)[0].rstrip(",;:") + " ..."
            shift = 0.42 if name in JOURNEY else 0.12
            if name in JOURNEY:
                circle = {"boxstyle": "circle,pad=0.25", "facecolor": "#c4561c", "edgecolor": "none"}
                number = str(JOURNEY.index(name) + 1)
                axes.text(x + 0.2, y + 0.31, number, color="white", va="center", ha="center", fontsize=8, bbox=circle)
            axes.text(x + shift, y + 0.31, name, weight="bold", va="center", fontsize=10)
            axes.text(x + shift + 0.105 * len(name) + 0.12, y + 0.31, text, va="center", fontsize=8, color="#333")
    axes.annotate("", (11.98, 0.3), (11.98, len(rows)), arrowprops={"arrowstyle": "-|>", "color": "#567"})
    axes.text(
        0.1,
        len(rows) - 0.1,
        "Every import runs down. Numbers: the way of a token. Yellow: modules at the root. "
        "Last row: no room below `score` and `compress` imports these.",
        fontsize=9,
    )
    return figure


if __name__ == "__main__":
    mpl.use("Agg")
    draw().savefig(ROOT / "docs" / "figures" / "rooms.png", dpi=110)
