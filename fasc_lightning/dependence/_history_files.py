"""The files of a history of rho in the folder of a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.fabric.utilities.rank_zero import rank_zero_info

from fasc_lightning.dependence._figures import rho_heatmap, rho_profile, save_figure
from fasc_lightning.dependence._history import RhoHistory

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Name of the table.
CSV_FILE = "rho_history.csv"


def draw_history(history: RhoHistory, threshold: float, observations: int) -> dict[str, Figure]:
    """Return the figures of a history by name; none, with a log message, if matplotlib is not installed.

    Args:
        history: Observations, at least one.
        threshold: Threshold of the marks of emergence.
        observations: Observations in a row that emergence needs.
    """
    if importlib.util.find_spec("matplotlib") is None:
        rank_zero_info("No figures of rho without matplotlib: pip install 'fasc-lightning[plot]'")
        return {}
    return {
        "rho_heatmap": rho_heatmap(history, threshold=threshold, observations=observations),
        "rho_profile": rho_profile(history.at()),
    }


def save_figures(figures: dict[str, Figure], folder: Path) -> None:
    """Write figures into a folder as PNG."""
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.png")
