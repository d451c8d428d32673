"""The message for missing optional packages."""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

import pytest

from fasc_lightning._utils import require

ROOT = Path(__file__).parents[2]


def test_installed_packages_pass_and_are_not_imported(monkeypatch):
    monkeypatch.delitem(sys.modules, "antigravity", raising=False)
    require("Flying needs", "plot", "antigravity")
    assert "antigravity" not in sys.modules


def test_missing_packages_are_named_with_their_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError) as error:
        require("This needs", "eval", "torch", "torch_pruning", "gguf", instead="or give a file")
    assert str(error.value) == (
        "This needs torch-pruning and gguf. Run `pip install 'fasc-lightning[eval]'`, or give a file."
    )


def test_every_extra_that_is_named_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = set()
    for file in [*(ROOT / "fasc_lightning").rglob("*.py"), *(ROOT / "recipes").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                named.add(node.args[1].value)
    assert named == {"demo", "eval", "gguf", "plot", "recovery", "table"} <= set(extras)
