"""The contracts of `make lint` cover every room."""

from __future__ import annotations

import shlex
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
ROOMS = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "fasc_lightning").rglob("*/__init__.py")}


def test_every_room_protects_its_modules():
    protected = {name for c in CONTRACTS if c["type"] == "protected" for name in c["protected_modules"]}
    open_rooms = {"fasc_lightning.studies"}  # its modules are rooms
    assert {f"{room}.*" for room in ROOMS - open_rooms} == protected


def test_every_room_and_module_has_its_layer():
    (ordered,) = (c["layers"] for c in CONTRACTS if c["type"] == "layers")
    placed = {name for layer in ordered for name in layer.split(" | ")}
    beside = {name for c in CONTRACTS if c["name"].startswith("Evaluation and data") for name in c["source_modules"]}
    former = {"fasc_lightning.bundled", "fasc_lightning.distillation"}  # hand on a name that has moved
    modules = {f"fasc_lightning.{file.stem}" for file in (ROOT / "fasc_lightning").glob("[!_]*.py")}
    rooms = {room for room in ROOMS if room.count(".") == 1}
    assert (modules | rooms) - former <= placed | beside


def test_the_test_that_contributors_are_shown_exists():
    (command,) = (
        line for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines() if "pytest" in line and "-k" in line
    )
    *_, path, _, word = shlex.split(command)
    assert word in (ROOT / path).read_text()
