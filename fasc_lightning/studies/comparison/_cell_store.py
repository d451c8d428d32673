"""Outcomes of cells on disk."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

from fasc_lightning._utils import (
    anything,
    boolean,
    fingerprint,
    integer,
    listed,
    mapping,
    number,
    optional,
    plain,
    read_json,
    record,
    text,
    write_json,
)
from fasc_lightning.studies.comparison._cells import FOLDER, Cell, Outcome
from fasc_lightning.studies.comparison._peer import folder_fingerprint

#: Schema of a file of :class:`CellStore`.
_CELL = record(
    {
        "key": text,
        "cell": mapping(anything),
        "outcome": record(
            {
                "parameters": integer(0),
                "kept": optional(number()),
                "zeros": optional(number()),
                "measured": optional(
                    record(
                        {
                            "losses": mapping(listed(optional(number()))),
                            "recalled": listed(boolean),
                            "preferred": listed(boolean),
                        },
                        {"divergence": mapping(listed(number(0))), "speed": mapping(number(0))},
                    )
                ),
                "seconds": mapping(number(0)),
                "plan": listed(mapping(plain)),
                "passes": integer(0),
                "error": text,
                "lasting": boolean,
            },
            {
                "bytes": integer(0),
                "refit": optional(record({"layers": integer(0), "reverted": boolean}, extra=True)),
            },  # like what else is optional, files of earlier versions lack it
        ),
    }
)


class CellStore:
    """Outcomes of cells as JSON files, one per cell, each written whole when the cell ends.

    A file serves only the comparison that wrote it: its key covers the cell and everything that the outcome depends on.

    Args:
        folder: Folder of the files.
        context: Fingerprint of the facts that all cells share: model, statistics, evaluation, versions.
    """

    def __init__(self, folder: Path, context: str) -> None:
        self.folder = folder
        self.context = context

    def key(self, cell: Cell) -> str:
        """Return the fingerprint of a cell and its context, and of the files of a folder."""
        files = [folder_fingerprint(cell.label)] if cell.method == FOLDER else []
        return fingerprint(self.context, asdict(cell), *files)

    def path(self, cell: Cell) -> Path:
        """Return the file of a cell."""
        return self.folder / (re.sub(r"[^\w.]+", "-", cell.name) + ".json")

    def load(self, cell: Cell) -> Outcome | None:
        """Return the kept outcome of a cell in the same context; None if there is none, or to try the cell again."""
        path = self.path(cell)
        if not path.is_file():
            return None
        content = read_json(path, _CELL)
        if content.pop("key") != self.key(cell):
            return None
        outcome = Outcome.from_dict(content["outcome"])
        return outcome if outcome.lasting else None

    def save(self, cell: Cell, outcome: Outcome) -> None:
        """Write the outcome of a cell."""
        content = {"key": self.key(cell), "cell": asdict(cell), "outcome": asdict(outcome)}
        write_json(content, self.path(cell))
